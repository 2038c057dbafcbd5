"""`pip install .` gives a package that works away from the checkout, its settings included."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_installed_wheel_finds_its_settings_from_any_directory(tmp_path: Path) -> None:
    python = sys.executable
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    own_build = ["--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path)]
    run(*pip, "wheel", *own_build, REPOSITORY, cwd=tmp_path)
    wheel = next(tmp_path.glob("nemo_trd-*.whl"))
    names = zipfile.ZipFile(wheel).namelist()
    assert {f"nemo_trd/report/page.{kind}" for kind in ("html", "css")} <= set(names)
    packed = {name for name in names if "/conf/" in name}
    conf = REPOSITORY / "conf"
    expected = {f"nemo_trd/conf/{f.relative_to(conf)}" for f in conf.rglob("*.yaml")}
    assert packed == expected

    run(python, "-m", "venv", "--without-pip", "fresh", cwd=tmp_path)
    fresh = tmp_path / "fresh" / "bin" / "python"
    run(*pip, "--python", fresh, "install", "--no-deps", wheel, cwd=tmp_path)
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site_packages = Path(run(fresh, "-c", where, cwd=tmp_path).strip())
    # Its dependencies are those of this environment; an editable install is not seen this way.
    (site_packages / "behind.pth").write_text(sysconfig.get_path("purelib"))
    code = (
        "import nemo_trd.config.schema as c; c.compose(['experiment=quickstart']); "
        "print(c.conf_dir()); print(c.__file__)"
    )
    found = [Path(line) for line in run(fresh, "-c", code, cwd=tmp_path).split()]
    assert found == [site_packages / "nemo_trd/conf", site_packages / "nemo_trd/config/schema.py"]
