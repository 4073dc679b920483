"""Let a virtual environment use the torch of the Python that runs this script: `python tools/link_torch.py VENV`.

Writes a .pth file that names the folder torch lies in. Exits with 1 when there is no torch, or one older than 2.10.
"""

import pathlib
import sys
import sysconfig


def main(venv: str) -> int:
    try:
        import torch
    except ImportError:
        return 1
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < (2, 10):
        print(f"torch {torch.__version__} is older than 2.10: installing the pinned one instead")
        return 1
    folder = pathlib.Path(torch.__file__).resolve().parents[1]
    site = pathlib.Path(sysconfig.get_path("purelib", vars={"base": venv, "platbase": venv}))
    (site / "torch_of_the_base_python.pth").write_text(f"{folder}\n", encoding="utf-8")
    print(f"using torch {torch.__version__} of {sys.executable}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
