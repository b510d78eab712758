"""Time of the embedded default, as a person sees it: the whole command, in a process of its own.

python -m slope_cli.benchmarks.demo
"""

import json
import subprocess
import tempfile
import time
from pathlib import Path

from slope_cli.utils.environment import environment
from slope_cli.utils.files import write_json
from sparse_kernels import children

from . import RESULTS


def main() -> None:
    """Run `slope pretrain --json` in an empty folder and write benchmarks/results/demo.json."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        command, environment_of_child = children.python(
            "from slope_cli.cli import main; main()", ["pretrain", "--json"]
        )
        done = subprocess.run(command, cwd=folder, env=environment_of_child, stdout=subprocess.PIPE, check=True)
        seconds = time.perf_counter() - started
        config = (Path(folder) / "runs/gpt2-nano/config.yaml").read_text()
    result = json.loads(done.stdout)
    write_json(RESULTS / "demo.json", {"machine": environment(), "seconds": seconds, "config": config, **result})
    print(f"{seconds:.1f} s, validation loss {result['loss']:.4f}, bigram {result['bigram_loss']:.4f}")


if __name__ == "__main__":
    main()
