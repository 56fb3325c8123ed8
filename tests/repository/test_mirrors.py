"""Every module of the package has a file of tests at the same place in tests/."""

import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PACKAGE, TESTS = ROOT / "halvit_jax", ROOT / "tests"
COMMANDS = {
    "bench",
    "check",
    "export",
    "halve",
    "main",
    "plan",
    "predict",
    "summary",
}  # their tests are in tests/commands/

# Module -> the files that test it, and why they are elsewhere.
ELSEWHERE: dict[str, tuple[str, ...]] = {
    # What a package exports, by the tests of its modules and by whoever uses it.
    "__init__.py": ("experiment/test_trained.py", "models/test_vit.py"),
    "convert/__init__.py": ("convert/test_engine.py", "convert/test_foreign_files.py"),
    "data/__init__.py": ("data/test_pipeline.py",),
    "data/sources/__init__.py": ("data/sources/test_open_sources.py",),
    "storage/__init__.py": ("storage/test_storage.py",),
    "models/__init__.py": ("models/test_contract.py", "models/test_own_family.py"),
    # One test for the classes that implement it.
    "models/family.py": ("models/test_contract.py", "models/test_own_family.py"),
    "models/partition.py": ("models/test_contract.py", "training/test_sharding.py"),
    "models/pvt_v2.py": ("models/test_pvt.py",),  # both versions are compared there
    "layers/next_block.py": ("models/test_nextvit.py", "models/test_golden.py"),
    "layers/residual.py": ("models/test_resnet.py", "models/test_golden.py"),
    # All recipes are compared with their golden files.
    "recipes/digits.py": ("repository/test_configs.py",),
    "recipes/imagenet.py": ("repository/test_configs.py", "recipes/test_published.py"),
    "recipes/resnet.py": ("repository/test_configs.py", "recipes/test_published.py"),
    "recipes/detection.py": ("repository/test_configs.py",),
    "convert/detectors.py": ("detection/test_golden_detectors.py", "convert/test_transfer.py"),
    # Whole detectors are compared with the references, which differ in their conventions.
    "detection/__init__.py": ("detection/test_golden_detectors.py",),
    "detection/conventions.py": ("detection/test_golden_detectors.py", "detection/test_anchors.py"),
    "detection/detector.py": ("detection/test_golden_detectors.py", "detection/test_detectors.py"),
    "detection/mask_rcnn.py": ("detection/test_golden_detectors.py", "detection/test_detectors.py"),
    "detection/retinanet.py": ("detection/test_golden_detectors.py", "detection/test_detectors.py"),
}


def mirror(module: pathlib.Path) -> pathlib.Path:
    """The file of tests of a module, relative to tests/."""
    folder = pathlib.Path("commands") if str(module.parent) == "." and module.stem in COMMANDS else module.parent
    return folder / f"test_{module.stem.strip('_')}.py"


def needs_tests(path: pathlib.Path) -> bool:
    """Whether a file has code: an `__init__.py` may be a docstring alone."""
    return path.name != "__init__.py" or len(path.read_text().splitlines()) > 3


MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py") if needs_tests(path))


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_every_module_has_its_file_of_tests(module: pathlib.Path) -> None:
    files = ELSEWHERE.get(str(module), (str(mirror(module)),))
    assert [file for file in files if not (TESTS / file).is_file()] == []


def test_what_is_tested_elsewhere_exists_and_has_no_mirror() -> None:
    for module in map(pathlib.Path, ELSEWHERE):
        assert module in MODULES
        assert not (TESTS / mirror(module)).exists(), f"{module} has tests of its own: remove its row"
