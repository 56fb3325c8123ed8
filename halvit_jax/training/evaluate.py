"""Evaluation: run a task over a finite loader, scoring every example exactly once."""

from collections.abc import Callable
from typing import NamedTuple

from jax.sharding import Mesh

from halvit_jax.protocols import Batch, Collector, Loader, PyTree, Task
from halvit_jax.training.fault_tolerance.preemption import STOP, PreemptionHandler
from halvit_jax.training.sharding import to_devices, to_host
from halvit_jax.training.step import EvalReport, make_eval_step

Metrics = dict[str, float | None]


class PreemptedError(Exception):
    """All hosts have agreed to stop before the end of an evaluation."""


def evaluate(
    task: Task,
    variables: PyTree,
    loader: Loader,
    mesh: Mesh,
    *,
    preemption: PreemptionHandler,
    heartbeat: Callable[[], None] = lambda: None,
    collected: Callable[[Collector], None] = lambda collector: None,
) -> Metrics:
    """The task's metrics over all examples of the loader, for variables {"params": ..., "model_state": ...}.

    The scores of each global batch are gathered to every host, and each host computes the metrics for itself.
    `heartbeat` is called after every batch, `collected` at the end, with what has the scores of all batches.

    Raises:
        PreemptedError: a host was asked to stop.
        RuntimeError: the masks of the batches do not sum to the number of examples that the loader announced.
    """
    eval_step, spec, collector = make_eval_step(task), task.batch_spec(), task.collector(loader.info)
    variables = (variables["params"], variables["model_state"])
    examples, before = 0, None

    def collect(scored: _Scored) -> int:
        host = to_host((scored.report, {name: scored.batch[name] for name in collector.reads}))
        collector.add(host[0].scored, host[1])
        return int(host[0].examples)

    for rows in loader.batches():
        batch = to_devices(preemption.attach_request({name: rows[name] for name in spec}), mesh)
        newest = _Scored(eval_step(*variables, batch), batch)
        if before is not None:  # read one batch late, so that two batches are in flight
            examples += collect(before)
            if int(before.report.request) == STOP:
                raise PreemptedError
        before = newest
        heartbeat()
    examples += 0 if before is None else collect(before)
    if examples != loader.num_examples:
        raise RuntimeError(f"scored {examples} examples where the split holds {loader.num_examples}")
    metrics = collector.result()
    collected(collector)
    return metrics


class _Scored(NamedTuple):
    report: EvalReport
    batch: Batch
