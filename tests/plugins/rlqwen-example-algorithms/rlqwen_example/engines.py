"""Engines that answer every prompt with the same tokens: one in the trainer's process, one in Ray workers."""

from rlqwen.rollout import Engine
from rlqwen.types import Completion, Group


class ScriptedEngine:
    """Say `token_ids` to every prompt, shifted by the seed so that completions differ."""

    def __init__(self, token_ids):
        self.version = 0
        self._token_ids = list(token_ids)

    def said(self, seed):
        return [token + seed % 5 for token in self._token_ids]

    def generate(self, requests):
        for request in requests:
            answers = [self.said(seed) for seed in request.seeds]
            completions = [Completion(ids, [-1.0] * len(ids), "stop", str(ids)) for ids in answers]
            yield Group(request.prompt, completions, self.version)

    def load_weights(self, version, weights, canary):
        self.version = version
        return {"sync/bytes": 0.0}

    def cancel(self):
        pass

    def close(self):
        pass


class Scripted(Engine):
    """Answer with a script in the trainer's process."""

    title = "script"
    takes_arguments = True

    @classmethod
    def build(cls, config, *, policy, tokenizer, max_model_length):
        return ScriptedEngine(**config.engine_args)


class ScriptedInWorker:
    """The same in a Ray worker."""

    def __init__(self, token_ids):
        self._script = ScriptedEngine(token_ids)
        self._waiting = []

    def add(self, request_id, token_ids, seed, sampling):
        self._waiting.append((request_id, seed))

    def step(self):
        done, self._waiting = self._waiting, []
        return [
            (request_id, (ids := self._script.said(seed), [-1.0] * len(ids), "stop", None)) for request_id, seed in done
        ]

    def abort(self, request_ids):
        self._waiting = [one for one in self._waiting if one[0] not in request_ids]

    def forget_prompts(self):
        pass

    def load(self, bundle):
        from rlqwen.rollout.weight_sync import LoadReport

        return LoadReport(bundle.version, canary_gap=None, rebuilt=False, seconds=0.0)


class ScriptedWorker(Engine):
    """Answer with a script in Ray workers."""

    title = "script"
    in_workers = True
    takes_arguments = True

    @classmethod
    def start(cls, settings):
        return ScriptedInWorker(**settings.arguments)
