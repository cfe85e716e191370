import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

from scripts import install

SCRIPT = Path(install.__file__)


def package(site: Path, name: str, *, record: bool = True) -> Path:
    """A package of one file as pip leaves it, with or without its last step."""
    site.mkdir(exist_ok=True)
    module, info = site / f"{name}.py", site / f"{name}-1.0.dist-info"
    module.write_text("VALUE = 1\n")
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    if record:
        (info / "RECORD").write_text(
            f"{name}.py,,{module.stat().st_size}\n__pycache__/{name}.cpython-311.pyc,,\n{info.name}/RECORD,,\n"
        )
    return module


def test_packages_that_were_cut_off_are_found(tmp_path: Path) -> None:
    site = tmp_path / "site"
    package(site, "whole")
    package(site, "unrecorded", record=False)
    package(site, "truncated").write_text("")
    package(site, "gone").unlink()
    found = install.half_installed(distributions(path=[str(site)]))
    assert {one.name for one in found} == {"unrecorded", "truncated", "gone"}


def test_only_a_finished_installation_of_the_same_requirements_is_current(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text("one")
    first = install.fingerprint(tmp_path)
    stamp = tmp_path / ".venv" / "stamp"
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    assert not install.is_current(stamp, first)
    stamp.write_text(first)
    assert not install.is_current(stamp, first), "the interpreter is gone"
    (tmp_path / ".venv" / "bin" / "python").touch()
    assert install.is_current(stamp, first)
    (tmp_path / "pyproject.toml").write_text("two")
    assert not install.is_current(stamp, install.fingerprint(tmp_path))


def test_a_project_that_moved_is_installed_again(tmp_path: Path) -> None:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "pyproject.toml").write_text("one")
    assert install.fingerprint(tmp_path / "here") != install.fingerprint(tmp_path / "there")


def test_bytecode_of_everything_is_compiled_beside_templates_that_are_no_python(tmp_path: Path) -> None:
    python, site = tmp_path / "bin" / "python", tmp_path / "lib" / "site-packages"
    python.parent.mkdir()
    python.symlink_to(sys.executable)
    (tmp_path / "lib").mkdir()
    package(site, "good")
    (site / "a_template.py").write_text("{{ no Python }}")
    install._compile(python)
    assert [path.name.split(".")[0] for path in (site / "__pycache__").iterdir()] == ["good"]


def test_the_cpu_build_of_the_pinned_torch_is_asked_for() -> None:
    assert install.cpu_torch(install.ROOT) == "torch==2.13.0+cpu"


def test_it_needs_to_be_told_the_second_index() -> None:
    result = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True)
    assert result.returncode == 2
    assert "--cpu-index" in result.stderr
