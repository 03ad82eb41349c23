"""The Dockerfile and the scripts in examples/ name files, keys and commands that are there."""

import json
import os
import re
import shlex
import stat
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.docs.pages import ROOT
from tests.docs.test_blocks import command_fault

EXAMPLES = ROOT / "examples"


def test_the_dockerfile_copies_what_is_there_and_not_ignored() -> None:
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = [source for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE) for source in line.split()[:-1]]
    assert copied
    assert {source for source in copied if not (ROOT / source).exists()} == set()
    assert set(copied) == kept


def test_the_dockerfile_holds_back_deepspeed_alone() -> None:
    lock = (ROOT / "requirements" / "cuda.txt").read_text()
    (script,) = re.findall(r"sed '([^']+)'", (ROOT / "Dockerfile").read_text())
    first = subprocess.run(["sed", script], input=lock, capture_output=True, text=True, check=True).stdout
    names = [set(re.findall(r"^([\w.-]+)==", text, re.MULTILINE)) for text in (lock, first)]
    assert names[0] - names[1] == {"deepspeed"}
    assert first.count("--hash") == lock.count("--hash") - 1


def test_the_dockerfile_says_the_versions_of_the_lock() -> None:
    head = (ROOT / "Dockerfile").read_text().split("FROM")[0]
    lock = (ROOT / "requirements" / "cuda.txt").read_text()
    for package, version in re.findall(r"(torch|vLLM) ([\d.]+\d)", head):
        assert f"\n{package.lower()}=={version} " in lock


def test_the_entry_point_and_command_of_the_image_exist() -> None:
    text = (ROOT / "Dockerfile").read_text()
    (entry,), (command,) = (re.findall(rf"^{word} (\[.*\])$", text, re.MULTILINE) for word in ("ENTRYPOINT", "CMD"))
    assert command_fault([*json.loads(entry)[2:], *json.loads(command)]) is None


@pytest.mark.parametrize("path", [ROOT / "Dockerfile", *sorted(EXAMPLES.iterdir())], ids=lambda path: path.name)
def test_every_command_in_a_comment_parses(path: Path) -> None:
    text = re.sub(r" \\\n# *", " ", path.read_text())
    words = [shlex.split(line, comments=True) for line in re.findall(r"^# {3}(\S.*)$", text, re.MULTILINE)]
    assert words
    found = [line[line.index("rlqwen") :] for line in words if "rlqwen" in line and "build" not in line]
    found += [["rlqwen", "run", *line[line.index("head") + 1 :]] for line in words if "head" in line]
    found += [
        ["rlqwen", "run", *line[place + 1 :]]
        for line in words
        for place, word in enumerate(line)
        if word.endswith(".sbatch")
    ]
    assert [fault for line in found if (fault := command_fault(line)) is not None] == []


def test_the_kubernetes_job_runs_a_recipe_and_knows_the_exit_codes() -> None:
    claim, job = yaml.safe_load_all((EXAMPLES / "kubernetes.yaml").read_text())
    spec = job["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    assert command_fault(["rlqwen", *container["args"]]) is None
    volumes = {volume["name"] for volume in spec["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    assert spec["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    rules = {
        rule["action"]: rule.get("onExitCodes", {}).get("values")
        for rule in job["spec"]["podFailurePolicy"]["rules"][:2]
    }
    assert rules == {"FailJob": [2], "Ignore": [75]}
    assert spec["restartPolicy"] == "Never"


def stand_in(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.mark.parametrize("code", [0, 1, 75])
def test_the_slurm_script_starts_ranks_and_requeues_after_a_save(code: int, tmp_path: Path) -> None:
    """A stand-in for srun starts two tasks, one for rlqwen says which rank it is."""
    stand_in(
        tmp_path,
        "srun",
        'shift; code=0; for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=$i SLURM_NTASKS=2 SLURM_NTASKS_PER_NODE=2 "$@"; '
        "c=$?; [ $c -gt $code ] && code=$c; done; exit $code",
    )
    stand_in(tmp_path, "rlqwen", f'echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR: $*"; exit {code}')
    stand_in(tmp_path, "scontrol", '[ "$1" = show ] && printf "node1\\nnode2\\n" || echo "scontrol $*"')
    done = subprocess.run(
        ["bash", EXAMPLES / "slurm.sbatch", "my.yaml", "train.run_name=a b"],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:2] == [f"{rank} {rank} 2 node1: run my.yaml train.run_name=a b resume=auto" for rank in (0, 1)]
    assert lines[2:] == (["scontrol requeue 7"] if code == 75 else [])


@pytest.mark.parametrize("name", ["slurm.sbatch", "ray-job.sh"])
def test_a_script_without_arguments_says_how_to_call_it(name: str) -> None:
    done = subprocess.run(["bash", EXAMPLES / name], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"examples/{name}" in done.stderr
