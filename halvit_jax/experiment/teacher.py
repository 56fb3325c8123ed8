"""The teacher of a distillation: its model, and its weights in the task's constants.

`teacher.init_from` names a workdir, a weight file of `halvit_jax.convert` or a PyTorch state. The first two know their
model; for the third, and to plan a run without the teacher's file, `teacher.name` gives it. A teacher computes in the
dtype of the run on images of the student's size, and is sharded over the devices like the student.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from halvit_jax import storage
from halvit_jax.convert import hub, readers, shapes_of, weights_file
from halvit_jax.convert.transfer import Transfer
from halvit_jax.experiment import init_from, tasks
from halvit_jax.experiment.workdir import TEACHER_FILE, read_config, read_json, split_source
from halvit_jax.models import create_model, partition_rules, transfer_rules
from halvit_jax.storage import Path
from halvit_jax.tasks.classification import Classification
from halvit_jax.tasks.distillation import Distillation, Teacher
from halvit_jax.training.sharding import partition
from halvit_jax.trees import map_paths, sha256, unflatten, variable_shapes

Colours = Sequence[float] | None
TASK = "distillation"  # the task.name that trains with a teacher


class DistillationSetup(NamedTuple):
    """A task with its teacher, and the teacher's record: {"source", "model", "sha256", ...}."""

    task: Distillation
    record: dict[str, Any]

    def lines(self) -> list[str]:
        """Lines for the log."""
        size, digest = f"{self.record['parameters']:,} parameters", f"sha256 {self.record['sha256'][:16]}"
        lines = [f"{self.record['model']}, {size}, {digest}", *self.record["arrays"]]
        return [f"teacher.init_from={self.record['source']}: {line}" for line in lines]


def is_used(config: ConfigDict) -> bool:
    """True if the run trains with a teacher."""
    return config.task.name == TASK


def abstract_distillation(config: ConfigDict, mesh: Mesh) -> Distillation:
    """The task of a run, its teacher as shapes and shardings only.

    Raises:
        ValueError: fields that are not allowed or do not fit each other.
    """
    return _named_task(config, mesh)[0]


def build_distillation(config: ConfigDict, mesh: Mesh) -> DistillationSetup:
    """The task of a run with its teacher.

    Raises:
        ValueError: what `abstract_distillation` refuses, and weights that are missing or belong to another model.
    """
    task, name = _named_task(config, mesh)
    source = config.teacher.init_from
    found = _read(source, name, task.teacher, task.model.num_classes)

    def place(path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: found.arrays[path][index])

    task.constants = map_paths(place, task.constants)
    record = {
        "source": source,
        "model": name,
        "parameters": sum(array.size for path, array in found.arrays.items() if path.startswith("params/")),
        "arrays": found.lines(),
        "sha256": sha256(found.arrays),
    }
    return DistillationSetup(task, record)


def load_teacher(config: ConfigDict, student: Classification) -> tuple[Teacher, str]:
    """The teacher of `config.teacher` for a student, with its variables as NumPy arrays; and the name of its model.

    Raises:
        ValueError: there is none, or its weights are missing or adapted to images of another size.
    """
    teacher, name = _describe(student, **config.teacher)
    found = _read(config.teacher.init_from, name, teacher.model, student.model.num_classes)
    if found.adapted:
        raise ValueError(
            f"teacher.init_from={config.teacher.init_from} is of another model.image_size than "
            f"{student.model.image_size}: {', '.join(found.adapted)}"
        )
    return teacher._replace(variables=unflatten(found.arrays)), name


def pin_teacher(record: dict[str, Any], workdir: Path, *, resumed: bool) -> None:
    """Record the teacher's digest; a resumed run must use the same teacher.

    Raises:
        ValueError: the weights are not the recorded ones.
    """
    path = workdir / TEACHER_FILE
    if resumed and path.is_file():
        before = read_json(path)
        if before["sha256"] != record["sha256"]:
            raise ValueError(
                f"teacher.init_from={record['source']} (sha256 {record['sha256'][:16]}) holds other weights than the "
                f"teacher that the run in --workdir={workdir} started with, {before['source']} (sha256 "
                f"{before['sha256'][:16]}); give that one, or another --workdir"
            )
    elif jax.process_index() == 0:
        storage.write_text(path, json.dumps(record, indent=2) + "\n")


def _named_task(config: ConfigDict, mesh: Mesh) -> tuple[Distillation, str]:
    """The task with a teacher of shapes only, and the name of the teacher's model."""
    student = tasks.build_task(config)
    teacher, name = _describe(student, **config.teacher)
    model = teacher.model
    shapes = variable_shapes(model)
    shardings = partition(shapes, partition_rules(model), mesh)
    shapes = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    teacher = teacher._replace(variables=shapes)
    task = {"mean": config.task.mean, "std": config.task.std, **config.classification}
    return Distillation(student.model, teacher=teacher, **config.distillation, **task), name


def _read(source: str, name: str, model: Any, num_classes: int) -> Transfer:
    """The arrays of a teacher's model, all of them from its source."""
    shapes, rules = shapes_of(model), transfer_rules(model)
    found = init_from.read(source, name, model, shapes=shapes, rules=rules, field="teacher.init_from")
    if found.initialized:
        raise ValueError(
            f"teacher.init_from={source} does not fit the teacher, which must have the student's "
            f"model.num_classes={num_classes}; missing: {', '.join(found.initialized)}; not used: "
            f"{', '.join(found.unused) or 'nothing'}"
        )
    return found


class _StoredModel(NamedTuple):
    """Model name and fields stored in a workdir or weight file of `halvit_jax.convert`."""

    name: str
    fields: dict[str, Any]  # of the model
    images: dict[str, Any]  # "mean" and "std", if stored


def _describe(
    student: Classification, *, init_from: str, name: str, mean: Colours, std: Colours
) -> tuple[Teacher, str]:
    """The model of `config.teacher` and its normalisation, without variables, and the model's name."""
    images = {field: value for field, value in (("mean", mean), ("std", std)) if value is not None}
    path, _ = split_source(init_from)
    on_hub = hub.is_source(path)
    exists = not on_hub and storage.parse(path, "teacher.init_from=").exists()
    known = _known(path) if exists else None
    if on_hub and not name:
        name = hub.model_of(path)[0] or ""
    if known:
        _check_agreement(init_from, {"name": name or known.name, **images}, {"name": known.name, **known.images})
        # The stored number of classes is kept, to be compared with the student's.
        name, fields, images = known.name, known.fields, images | known.images
    elif name:
        fields = {"num_classes": student.model.num_classes}
    elif on_hub or exists:
        raise ValueError(f"teacher.init_from={init_from} does not name its model; set teacher.name")
    else:
        raise ValueError(
            f"teacher.init_from={init_from} does not exist ({storage.parse(path).absolute()}); train the teacher "
            "first, or set teacher.name to plan a run without it"
        )
    try:
        model = create_model(name, **fields | {"image_size": student.model.image_size, "dtype": student.model.dtype})
    except ValueError as error:
        reason = str(error).replace("model.name=", "teacher.name=")
        raise ValueError(f"the teacher, for images of the student's size: {reason}") from error
    return Teacher(model, {}, **({"mean": student.mean, "std": student.std} | images)), name


def _known(source: str) -> _StoredModel | None:
    """The stored model of a source, if it has any."""
    if storage.parse(source).is_dir():
        config = read_config(storage.parse(source))
        fields = {field: value for field, value in config.model.items() if value is not None}
        return _StoredModel(fields.pop("name"), fields, {"mean": config.task.mean, "std": config.task.std})
    if not source.endswith(".safetensors"):
        return None
    weights = readers.read(source)
    found = weights_file.from_weights(weights)
    if found is None:
        return None
    info = json.loads(weights.metadata.get("info", "{}"))
    return _StoredModel(found.name, found.fields, {field: info[field] for field in ("mean", "std") if field in info})


def _check_agreement(source: str, given: dict[str, Any], stored: dict[str, Any]) -> None:
    for field, value in given.items():
        value, known = (tuple(each) if isinstance(each, list) else each for each in (value, stored.get(field, value)))
        if value != known:
            raise ValueError(
                f"teacher.{field}={value!r}, but the model in teacher.init_from={source} has {known!r}; leave "
                "the field at its default"
            )
