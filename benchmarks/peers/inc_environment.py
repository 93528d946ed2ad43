"""Make an environment for Intel Neural Compressor: ``python -m benchmarks.peers.inc_environment FOLDER``.

It asks for other versions of numpy and more than its surroundings have, but runs with these. So its wheel and what it
imports are installed without their dependencies, in front of the packages of the Python that runs this: torch
and transformers are the very ones that every other tool is measured with, and nothing is downloaded twice. The folder
should lie outside the repository.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import venv
from pathlib import Path

PACKAGES = """
neural-compressor==3.4 setuptools==80.9.0 six==1.17.0 prettytable==3.18.0 wcwidth==0.9.4 py-cpuinfo==9.0.0 schema==0.7.8
Deprecated==1.3.1 wrapt==2.5.2 opencv-python-headless==5.0.0.93 pandas==3.1.1 pytz==2026.6 scikit-learn==1.9.1
joblib==1.6.0 threadpoolctl==3.8.0 cloudpickle==3.1.3 loky==3.7.0 narwhals==2.29.0 pycocotools==2.0.11
requests==2.34.2 urllib3==2.8.0 charset-normalizer==3.5.3 certifi==2026.10.19.post1
""".split()
"""What its import needs beside torch, numpy, scipy, pyyaml, psutil and pillow."""


def make(folder: Path) -> Path:
    """Make the environment and return its Python, which has imported the pruner once."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    place = subprocess.run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], check=True,
                           stdout=subprocess.PIPE, text=True).stdout.strip()  # fmt: skip
    around = [path for path in sys.path if Path(path).name == "site-packages"]
    (Path(place) / "surroundings.pth").write_text("\n".join(around) + "\n", encoding="utf-8")
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--no-deps", "--ignore-installed", *PACKAGES], check=True
    )
    subprocess.run([python, "-c", "import neural_compressor.training"], check=True)
    return python


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.inc_environment", description=__doc__)
    parser.add_argument("folder", type=Path)
    print(make(parser.parse_args().folder))
