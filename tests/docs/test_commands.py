"""Whatever the README, the guides and the benchmarks' pages tell a reader to run, run in a small form, in the order of the page.

A command that stands in a page and not here fails a test, and so does one that stands here and in no page any more.
"""

import re
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlqwen.cli import main
from rlqwen.run_folder.layout import mark_run_folder
from tests.patience import PATIENCE_S

ROOT = Path(__file__).parents[2]
GUIDES = ("docs/quickstart.md", "docs/command-line.md", "docs/faults-and-resume.md")
PAGES = ("README.md", *GUIDES, "CONTRIBUTING.md", "SECURITY.md", "benchmarks/RESULTS.md", "benchmarks/MOE.md")
STEP = ["train.max_steps=1", "train.per_device_train_batch_size=8", "train.save_strategy=no", "train.eval_strategy=no"]
SAMPLE = ["train.num_generations=2", "train.max_completion_length=8", "train.num_generations_eval=1"]
BUNDLED = "data={train: {path: builtin:pairs}}"
OF = {
    "sft": ["sft.model.path=tiny", "sft.data.eval=null", "sft.data.train.args.size=64"],
    "dpo": [f"dpo.{BUNDLED}", "dpo.train.max_length=1024"],
    "reward": [f"reward.{BUNDLED}", "reward.train.max_length=1024"],
    "ppo": [
        "ppo.data.eval=null",
        "ppo.data.train.args.size=64",
        "ppo.train.num_ppo_epochs=1",
        *SAMPLE,
        "rollout.engine=transformers",
    ],
    "grpo": ["grpo.data.eval=null", "grpo.data.train.args.size=64", *SAMPLE, "rollout.engine=transformers"],
    "distillation": [
        "sft.model.init_kwargs={}",
        "distillation.data.eval=null",
        "distillation.data.train.args.size=64",
        *SAMPLE,
        "rollout.engine=transformers",
    ],
}


def stages(*algorithms: str) -> list[str]:
    """Makes a run of several recipes small."""
    return [*STEP, *(word for algorithm in algorithms for word in OF[algorithm])]


BENCHMARK = ["--steps", "1", "--engines", "transformers", "--hidden", "64", "--layers", "1", "--vocab", "512"]
SMALL: dict[str, list[str] | str] = {
    # In the README and the guides
    "rlqwen recipes": [],
    "rlqwen recipes copy quickstart_grpo mine.yaml": [],
    "rlqwen check grpo_gsm8k_qwen3_0.6b": [
        "model.path=tiny",
        "data.train.path=builtin:questions",
        "train.max_completion_length=256",
    ],
    "rlqwen run grpo_gsm8k_qwen3_0.6b train.learning_rate=2e-6": [
        "model.path=tiny",
        "data.train.path=builtin:questions",
        *STEP,
        *SAMPLE,
        "rollout.engine=transformers",
    ],
    "rlqwen run dpo_en_qwen3_0.6b model.path=builtin:tiny-qwen3 data.train.path=builtin:pairs train.max_steps=2": (
        "as tests/test_shipped_recipes.py runs it"
    ),
    "rlqwen eval runs/quickstart/grpo/final --data quickstart_grpo -k 8": ["--limit", "2", "--engine", "transformers"],
    "rlqwen eval runs/dpo/final --against runs/sft/final --data test.jsonl --rewards runs/reward/final": [
        "--limit",
        "2",
        "--engine",
        "transformers",
        "--max-tokens",
        "8",
    ],
    "rlqwen data check train.jsonl --eval test.jsonl --model Qwen/Qwen3-0.6B": [],
    "rlqwen data show my_recipe.yaml --row 17": [],
    "rlqwen data pairs runs/sft/final --data prompts.jsonl --rewards accuracy --output pairs.jsonl": [
        "--engine",
        "transformers",
        "--max-tokens",
        "8",
        "--rewards",
        "my_reward.py:tokens",  # a model of random weights is never right
    ],
    "rlqwen export runs/gsm8k out --dtype bfloat16": [],
    "rlqwen run quickstart_sft quickstart_dpo": stages("sft", "dpo"),
    "rlqwen run quickstart_sft quickstart_ppo": stages("sft", "ppo"),
    "rlqwen run quickstart_sft quickstart_reward quickstart_ppo_reward": stages("sft", "reward", "ppo"),
    "rlqwen run quickstart_sft quickstart_grpo quickstart_student quickstart_distillation": stages(
        "sft", "grpo", "distillation"
    ),
    "rlqwen plan Qwen/Qwen3-30B-A3B --gpus 16xH100-80G --best": [],
    "rlqwen run my.yaml --resume": ["train.max_steps=2", "--allow-changes"],
    "rlqwen run my.yaml resume=auto": ["output_dir=runs/auto"],
    "rlqwen run my.yaml resume=auto --max-restarts 3": ["output_dir=runs/supervised"],
    "rlqwen verify-resume my.yaml": ["--steps", "2"],
    "rlqwen run my.yaml --nproc-per-node 4 parallel.zero_stage=3": ["--nproc-per-node", "2", "output_dir=runs/ranks"],
    "rlqwen run grpo.yaml rollout.max_staleness=1": [],
    # In benchmarks/
    "rlqwen run quickstart_grpo rollout.max_staleness=1": "as rlqwen run grpo.yaml rollout.max_staleness=1",
    "rlqwen run quickstart_sft quickstart_grpo": stages("sft", "grpo"),
    "rlqwen run quickstart_ppo": "with its first stage, above",
    "python benchmarks/grpo_vs_trl.py --steps 6": BENCHMARK,
    "python benchmarks/cpu.py": ["--tiny", "--only", "grpo-short,sft,dpo,products"],
    "python benchmarks/cpu.py --only sft,dpo": "as the one above",
    "python benchmarks/gpu.py --out FOLDER --tiny": [],
    "python benchmarks/gpu.py --out FOLDER": "as the one above, but for the shapes",
    "python benchmarks/gpu.py --out FOLDER --only attention,head": "as the one above",
    "python benchmarks/plan_time.py": ["--tokens", "32", "--updates", "3", "--rounds", "1"],
    "python benchmarks/data_scale.py": ["--sizes", "60", "1100", "--trl-sizes", "60", "--processes", "1"],
    "python benchmarks/rollout_scale.py --only scale --workers 8 512": "as the one below",
    "python benchmarks/rollout_scale.py": [
        "--only",
        "scale",
        "--workers",
        "2",
        "4",
        "--groups",
        "4",
        "--scale-s",
        "0.2",
    ],
    "python benchmarks/routing_replay.py": "its parts in tests/packing/test_routing_replay.py",
    "python benchmarks/routing_replay.py --initializer-range 0.1": "as the one above",
    "python benchmarks/routing_replay.py --initializer-range 0.1 --prompts 16 --tokens 32 --model builtin:tiny-qwen3.5-moe": (
        "as the one above"
    ),
    "python benchmarks/grpo_vs_trl.py": "as the one above",
    "python benchmarks/packed_vs_sequential.py --rounds 5": [
        "--models",
        "qwen3_5_text",
        "--workload",
        "short",
        "--rounds",
        "1",
        "--hidden",
        "64",
        "--layers",
        "2",
        "--vocab",
        "512",
    ],
    "python benchmarks/grpo_vs_trl.py --steps 4 --workload skewed --engines transformers": "as the one above",
}
"""What is added to a command, or where else it is run; of files of the reader's, `files` makes small ones."""
COMMAND = re.compile(r"(?:rlqwen|python|make|torchrun) .+")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text("utf-8"), re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """Without their comments, as they stand in fenced blocks, in lines set off by four blanks, or in backticks; those of the
    benchmarks' own help too."""
    lines = []
    for page in PAGES:
        text = (ROOT / page).read_text("utf-8")
        lines += [line for block in blocks(page, "bash") for line in block.splitlines()]
        lines += re.findall(r"^    ((?:rlqwen|python|make) .*)$", text, re.MULTILINE)
        lines += re.findall(r"`((?:rlqwen run|python benchmarks/|make) [^`]+)`", text)
    for script in sorted((ROOT / "benchmarks").glob("*.py")):
        lines += re.findall(r"^    (python benchmarks/[^\[\n]+)", script.read_text("utf-8"), re.MULTILINE)
    bare = (" ".join(line.partition("#")[0].split()) for line in lines)
    return [line for line in dict.fromkeys(bare) if COMMAND.fullmatch(line)]


def test_every_command_of_the_pages_has_a_small_form() -> None:
    found = [line for line in commands() if not line.startswith("make ")]
    assert sorted(set(found) - set(SMALL)) == [], "give them a small form in SMALL"
    assert sorted(set(SMALL) - set(found)) == [], "no page names them any more"


@pytest.mark.parametrize("line", [line for line in commands() if line.startswith("make ")])
def test_make_knows_the_target(line: str) -> None:
    done = subprocess.run([*shlex.split(line), "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


MINE = """\
algorithm: sft
model: {path: tiny}
data: {train: {generator: arithmetic, args: {kind: sft, size: 64}}}
train: {max_steps: 1, per_device_train_batch_size: 4, save_steps: 1}
output_dir: runs/mine
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, tiny_model_path: Path) -> Path:
    """A folder with what the pages take to be there: recipes, rows, and runs that are done."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "tiny").symlink_to(tiny_model_path)
    for name in ("my.yaml", "my_recipe.yaml"):
        (folder / name).write_text(MINE)
    grpo = yaml.safe_load((ROOT / "recipes" / "quickstart_grpo.yaml").read_text())
    grpo["model"]["path"], grpo["output_dir"] = "tiny", "runs/ahead"
    grpo["rollout"]["num_cpus_per_worker"] = 0.5
    grpo["train"] |= {
        "max_steps": 2,
        "per_device_train_batch_size": 8,
        "max_completion_length": 8,
        "eval_on_start": False,
        "eval_strategy": "no",
    }
    grpo["data"] = {"train": {"generator": "arithmetic", "args": {"size": 64}}}
    (folder / "grpo.yaml").write_text(yaml.safe_dump(grpo))
    (folder / "my_reward.py").write_text(
        "def tokens(completion_ids, **kwargs):\n    return [sum(ids) for ids in completion_ids]\n"
    )
    row = '{"prompt": [{"role": "user", "content": "%d + 1 = ?"}], "solution": "%d"}\n'
    turns = '{"messages": [{"role": "user", "content": "%d + 1 = ?"}, {"role": "assistant", "content": "%d"}]}\n'
    (folder / "train.jsonl").write_text("".join(turns % (i, i + 1) for i in range(8)))
    answered = row.replace('"solution"', '"completion": "so", "solution"')
    (folder / "test.jsonl").write_text("".join(answered % (i, i + 1) for i in range(50, 54)))
    (folder / "prompts.jsonl").write_text("".join(row % (i, i + 1) for i in range(4)))
    return folder


def run_here(words: list[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert main(words) == 0, words


def small_form(line: str, more: list[str]) -> list[str]:
    words = shlex.split(line.replace("Qwen/Qwen3-0.6B", "tiny"))
    for option in ("--nproc-per-node", "--steps"):
        if option in words and option in more:
            del words[(at := words.index(option)) : at + 2]
    return words + more


def prepare(line: str) -> None:
    """Make the runs that a command goes on from, which the pages take to be there."""
    if "runs/dpo/final" in line or "runs/sft/final" in line or "runs/quickstart/grpo/final" in line or "gsm8k" in line:
        for name in ("sft", "dpo", "quickstart/grpo", "gsm8k"):
            if not Path("runs", name).exists():
                Path("runs", name).mkdir(parents=True)
                mark_run_folder(Path("runs", name))
                shutil.copytree(Path("tiny").resolve(), Path("runs", name, "final"))
    if "runs/reward/final" in line and not Path("runs/reward").exists():
        run_here(
            [
                "run",
                "quickstart_reward",
                "model.path=tiny",
                "output_dir=runs/reward",
                *STEP,
                BUNDLED,
                "train.max_length=1024",
            ]
        )
    if "--resume" in line:
        run_here(["run", "my.yaml"])


@pytest.mark.slow
@pytest.mark.parametrize("line", [line for line, how in SMALL.items() if isinstance(how, list)])
def test_the_command_runs(
    line: str, files: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(files)
    monkeypatch.setenv("RLQWEN_DISPLAY", "plain")
    prepare(line)
    more = SMALL[line]
    assert isinstance(more, list)
    words = small_form(line, more)
    if words[0] == "rlqwen" and not {"--max-restarts", "--nproc-per-node", "verify-resume"} & set(words):
        run_here(words[1:])
        return
    start = [sys.executable, "-m", "rlqwen"] if words[0] == "rlqwen" else [sys.executable, str(ROOT / words[1])]
    command = [*start, *words[1 if words[0] == "rlqwen" else 2 :]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.slow
def test_the_script_of_the_readme_trains(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own text; the model, the data set and the size of the run are others."""
    import datasets

    (script,) = [block for block in blocks("README.md", "python") if "GRPOTrainer" in block]
    size = "num_generations=2, per_device_train_batch_size=4, max_completion_length=8, max_steps=1"
    small_run = f'{size}, save_strategy="no", rollout={{"engine": "transformers"}}'
    for given, small in (('"Qwen/Qwen3-0.6B"', '"tiny"'), ("num_generations=8", small_run)):
        assert script.count(given) == 1
        script = script.replace(given, small)
    monkeypatch.chdir(files)

    def load_dataset(name: str, split: str) -> Any:
        assert (name, split) == ("trl-lib/DeepMath-103K", "train")
        prompt = [{"role": "user", "content": "Solve x + 1 = 2."}]
        return datasets.Dataset.from_list([{"prompt": prompt, "solution": "$1$"}] * 4)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    exec(compile(script, "<README.md>", "exec"), {"__name__": "__main__"})  # noqa: S102
    assert (files / "runs/first/final/model.safetensors").is_file()


@pytest.mark.slow
def test_the_package_of_the_guide_is_listed_as_a_reward(tmp_path: Path) -> None:
    (project,) = blocks("docs/rewards.md", "toml")
    (module,) = [block for block in blocks("docs/rewards.md", "python") if block.startswith("# my_reward.py")]
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "pyproject.toml").write_text(project)
    (tmp_path / "package" / "my_reward.py").write_text(module)
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*install, "--target", str(tmp_path / "site"), str(tmp_path / "package")], check=True)
    code = f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); from rlqwen.cli import main; main(['rewards'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert re.search(r"^digits .*rlqwen-reward-digits 1\.0", done.stdout, re.MULTILINE)
    names: dict[str, Any] = {}
    exec(compile(module, "my_reward.py", "exec"), names)  # noqa: S102
    assert names["digits"]([[{"content": "it is 12"}]], solution=["13"]) == [0.5]
