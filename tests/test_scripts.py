"""The launch scripts start the command on every node, and JAX finds the others by Slurm."""

import json
import os
import pathlib
import stat
import subprocess
import sys

import pytest
import yaml

ROOT = pathlib.Path(__file__).parent.parent
OPTIONS = ["--config", "configs/diffrate_vitb.py", "--config.data.dir=/data/with space"]


def _executable(path: pathlib.Path, text: str) -> str:
  path.write_text(text)
  path.chmod(path.stat().st_mode | stat.S_IEXEC)
  return str(path)


def _run(script: str, tmp_path: pathlib.Path, **environment: str) -> list[str]:
  """The arguments that the cluster's own command is given."""
  path = f"{tmp_path}:{os.environ['PATH']}"
  command = ["bash", str(ROOT / "scripts" / script), *OPTIONS]
  environment = {**os.environ, "PATH": path, **environment}
  result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
  assert result.returncode == 0, result.stderr
  return result.stdout.splitlines()


def test_slurm_starts_a_process_per_node(tmp_path):
  _executable(tmp_path / "srun", '#!/bin/sh\nprintf "%s\\n" "$@"; pwd\n')
  arguments = _run("slurm.sh", tmp_path, SLURM_SUBMIT_DIR=str(ROOT))
  command = ["python", "-m", "vitcomp_jax.main", "--distributed", *OPTIONS]
  assert arguments == ["--kill-on-bad-exit=1", *command, str(ROOT)]


def test_a_tpu_runs_the_command_on_every_host(tmp_path):
  gcloud = _executable(tmp_path / "gcloud", '#!/bin/sh\nprintf "%s\\n" "$@"\n')
  arguments = _run("tpu_pod.sh", tmp_path, TPU="pod", ZONE="here", GCLOUD=gcloud)
  assert "--worker=all" in arguments and "pod" in arguments
  shell = arguments[arguments.index("--command") + 1]
  start = "cd ~/vitcomp_jax && exec "
  assert shell.startswith(start)
  # The remote shell sees the arguments as they were given.
  printed = subprocess.run(
    ["bash", "-c", 'printf "%s\\n" ' + shell.removeprefix(start)], capture_output=True, text=True
  ).stdout.splitlines()
  assert printed == ["python", "-m", "vitcomp_jax.main", "--distributed", *OPTIONS]


def test_the_job_set_runs_the_command():
  job = yaml.safe_load((ROOT / "scripts/gke_jobset.yaml").read_text())["spec"]
  pod = job["replicatedJobs"][0]["template"]["spec"]
  container = pod["template"]["spec"]["containers"][0]
  assert container["command"] == ["python", "-m", "vitcomp_jax.main", "--distributed"]
  assert pod["parallelism"] == pod["completions"]
  mounted = {mount["name"] for mount in container["volumeMounts"]}
  assert mounted == {volume["name"] for volume in pod["template"]["spec"]["volumes"]}


_SRUN = """#!/bin/bash
# What Slurm tells its tasks, for two of them on this machine.
shift
export SLURM_JOB_ID=$(( $$ % 4000 )) SLURM_STEP_NODELIST=localhost SLURM_NTASKS=2
for i in 0 1; do
  SLURM_PROCID=$i SLURM_LOCALID=$i "$@" &
  pids="$pids $!"
done
for pid in $pids; do wait $pid || exit 1; done
"""


@pytest.mark.slow
def test_processes_find_each_other_by_slurm(tmp_path):
  _executable(tmp_path / "srun", _SRUN)
  python = '#!/bin/bash\nshift 2\nexec "$PYTHON" -m tests.tiny_main "$@"\n'
  _executable(tmp_path / "python", python)
  options = ["--config", "tests/tiny_config.py", "--workdir", str(tmp_path / "run")]
  environment = {
    **os.environ,
    "PATH": f"{tmp_path}:{os.environ['PATH']}",
    "PYTHON": sys.executable,
    "SLURM_SUBMIT_DIR": str(ROOT),
    "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1",
  }
  command = ["bash", str(ROOT / "scripts/slurm.sh"), *options, "--config.search.steps=3"]
  result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
  assert result.returncode == 0, result.stderr
  device = json.loads((tmp_path / "run/config.json").read_text())["device"]
  assert device.startswith("2 x ")
