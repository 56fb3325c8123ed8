"""The report on an installation."""

import importlib.metadata
import pathlib

import pytest
from absl import flags
from packaging.requirements import Requirement

from halvit_jax.cli import doctor


def test_required_packages_are_installed_and_each_extra_has_a_line() -> None:
    lines = list(doctor.package_lines())
    assert not any(missing for missing, _ in lines)
    text = "\n".join(line for _, line in lines)
    assert f"installed jax {importlib.metadata.version('jax')}" in text
    for extra in importlib.metadata.metadata("halvit_jax").get_all("Provides-Extra"):
        assert f"extra     {extra}: " in text


def test_a_missing_and_an_old_package_are_named_with_the_command_that_adds_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted = ["jax>=999", "not_a_package_at_all>=2", "flax"], {"more": ["not_a_package_at_all"]}
    required, extras = [Requirement(text) for text in wanted[0]], {"more": [Requirement(wanted[1]["more"][0])]}
    monkeypatch.setattr(doctor, "requirements", lambda: (required, extras))
    lines = list(doctor.package_lines())
    assert [missing for missing, _ in lines] == [True, True, False, False]
    assert lines[0][1].endswith(f"jax is {importlib.metadata.version('jax')}: pip install 'jax>=999'")
    assert lines[1][1].endswith("not_a_package_at_all is not installed: pip install 'not_a_package_at_all>=2'")
    assert lines[3][1].endswith("pip install not_a_package_at_all")


def test_devices_and_prepared_data_sets_are_listed(tmp_path: pathlib.Path) -> None:
    assert doctor.device_lines()[0].startswith("  devices   8 cpu")
    assert "none prepared" in doctor.data_lines(tmp_path)[0]
    (tmp_path / "digits" / "1.0.0").mkdir(parents=True)
    (tmp_path / "digits" / "1.0.0" / "dataset_info.json").touch()
    assert doctor.data_lines(tmp_path) == [f"  data      digits in {tmp_path}"]


@pytest.mark.parametrize(("missing", "code"), [(True, 1), (False, 0)])
def test_the_exit_code_says_whether_a_required_package_is_missing(
    missing: bool, code: int, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "package_lines", lambda: iter([(missing, "  a line")]))
    values = flags.FlagValues()
    flags.DEFINE_string("data_dir", str(tmp_path), "", flag_values=values)
    values.mark_as_parsed()
    monkeypatch.setattr(doctor.flags, "FLAGS", values)
    with pytest.raises(SystemExit) as ended:
        doctor.main(["doctor"])
    assert ended.value.code == code
