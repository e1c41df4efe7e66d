"""`SeedsTogether`: runs that differ in their seed alone, trained by one compiled program with an axis of seeds.

Each run stays a call of `fit` of its own, in a thread of its own: folder, order of the data, evaluations, checkpoints,
early stop. The threads meet where a dispatch of steps begins. The last to come stacks the state and the data of all
runs inside one program, `jax.vmap` of the one that a single run compiles, and each run receives its slice.

A run has the same place among the seeds in every session, and the program has always as many places as there are
seeds: the place of a run that has ended, failed, or waits for its folder, is filled with a copy of another run, and
what comes out there is dropped. That costs the time of the runs that are gone, and no further compile. So a run's bits
depend on its place and on the number of places, and neither on what the other runs do nor on kills. They differ from
those of a run that is trained alone, since XLA rounds a product of stacked matrices in another order.

On a CPU it brings nothing (`experiments/benchmarks/README.md`). It is made for a GPU and a model so small that a step
is over before the next one is launched, which is not measured.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmp.errors import InputError
from jaxmp.experiment.experiment import Experiment
from jaxmp.experiment.identity import differences
from jaxmp.runs.hooks import Pause, StepInfo
from jaxmp.runs.trainer import Trainer
from jaxmp.training.feed import Feed, Resident
from jaxmp.training.metrics import Metrics
from jaxmp.training.state import TrainState

NOT_BATCHED = (LookupError, NotImplementedError, TypeError, ValueError)
"""what JAX raises where a primitive has no rule for a further axis, or where shapes differ; InputError is among them"""

CONTEXTS: dict[str, Callable[[Any], Any]] = {
    "jax_enable_x64": jax.enable_x64,
    "jax_default_matmul_precision": jax.default_matmul_precision,
    "jax_default_device": jax.default_device,
    "jax_numpy_dtype_promotion": jax.numpy_dtype_promotion,
    "jax_debug_nans": jax.debug_nans,
}
"""settings of JAX that a `with` statement changes for its own thread alone, and that statement"""


class NotTogether(InputError):
    """The runs cannot be trained by one program. The message says why."""


def require_together(trainer: Trainer) -> None:
    """Raises NotTogether, with the reason, if the runs of an experiment cannot share a program with other seeds."""
    if trainer.devices.count > 1:
        raise NotTogether(
            f"--seeds-together: one program of all seeds runs on a single device, and there are "
            f"{trainer.devices.count}; expected a worker for each, by --jobs"
        )
    if trainer.devices.mode != "jit":
        raise NotTogether("--seeds-together: parallel.mode is pmap; expected jit")
    if trainer.is_streamed:
        raise NotTogether(
            "--seeds-together: the training set is larger than data.device_limit and is streamed, so that each step is "
            "a dispatch of its own, for which all seeds would wait; expected data on the device, or no --seeds-together"
        )
    if (impl := str(jax.random.key_impl(jax.random.key(0)))) != "threefry2x32":
        raise NotTogether(
            f"--seeds-together: random keys are {impl!r}, which draw the numbers of the first key for all of an axis; "
            "expected threefry2x32"
        )
    if not trainer.fuse_steps:
        raise NotTogether(
            "--seeds-together: the model has convolutions, whose gradients XLA:CPU computes naively inside the loop of "
            "a dispatch (mnist_cnn: 66 ms a step alone, 915 in a loop); expected a GPU, or no --seeds-together"
        )


class _Request(NamedTuple):
    """What a run waits for: so many steps from a state."""

    feed: Resident
    carry: tuple[TrainState, Metrics]
    data: tuple[Any, Any, Any]
    """columns, rows of the epoch, and arguments of the run"""
    left: int
    """steps still to run"""
    error: Exception | None = None


@dataclass
class SeedsTogether:
    """The runs of `count` seeds, and the program that trains them."""

    count: int
    """number of places in the program, a seed each"""
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _expected: set[int] = field(default_factory=set)
    """places whose run takes part in the next dispatch"""
    _started: set[int] = field(default_factory=set)
    """places whose run has come to its first dispatch, waits for its folder, or has ended"""
    _requests: dict[int, _Request] = field(default_factory=dict)
    _ended: threading.Event = field(default_factory=threading.Event)
    _program: Callable[..., Any] | None = None
    _has_run: bool = False
    _columns: Any = None
    _experiment: Experiment | None = None
    """of the first run"""

    def run(self, train: Callable[[Place], Any]) -> list[Any]:
        """Calls `train(place)` for all places, in a thread each, and waits for all of them.

        They are started one after the other: what the first compiles, the next finds in JAX's cache.

        Returns: for each place, what `train` returned or the exception that it raised, which ended the others, too.
        """
        outcomes: list[Any] = [None] * self.count
        self._expected.update(range(self.count))
        settings = {name: getattr(jax.config, name) for name in CONTEXTS}  # of this thread

        def call(index: int) -> None:
            place = Place(self, index)
            try:
                with contextlib.ExitStack() as stack:
                    for name, value in settings.items():
                        if value != getattr(jax.config, name):
                            stack.enter_context(CONTEXTS[name](value))
                    outcomes[index] = train(place)
            except BaseException as error:  # the caller decides which of them counts
                outcomes[index] = error
                self._ended.set()
            finally:
                place.leave()

        threads = []
        try:
            for index in range(self.count):
                # A daemon: a second Ctrl-C ends the process, as it does where a run is trained alone.
                run = functools.partial(contextvars.copy_context().run, call, index)
                thread = threading.Thread(target=run, name=f"seed-{index}", daemon=True)
                thread.start()
                threads.append(thread)
                with self._changed:
                    self._changed.wait_for(lambda index=index: index in self._started)  # type: ignore[misc]
            for thread in threads:
                thread.join()
        except BaseException:
            self._ended.set()  # those that still run pause after their dispatch
            with self._changed:
                self._expected &= set(range(len(threads)))
                self._changed.notify_all()
            raise
        return outcomes

    def leave(self, index: int) -> None:
        """Lets the others go on without the run at `index`, until it asks for a dispatch again."""
        with self._changed:
            self._expected.discard(index)
            self._started.add(index)
            self._changed.notify_all()

    def dispatch(self, index: int, request: _Request) -> tuple[TrainState, Metrics]:
        """Runs the steps that a run asks for, together with those of the others. Waits until all have asked."""
        with self._changed:
            self._expected.add(index)
            self._started.add(index)
            self._requests[index] = request
            self._changed.notify_all()
            while (request := self._requests[index]).left and request.error is None:
                asking = {i for i, each in self._requests.items() if each.left and each.error is None}
                if asking >= self._expected:
                    self._step({i: self._requests[i] for i in sorted(asking)})
                    self._changed.notify_all()
                else:
                    self._changed.wait()
            del self._requests[index]
        if request.error is not None:
            raise request.error
        return request.carry

    def _step(self, asking: Mapping[int, _Request]) -> None:
        """Runs as many steps as all that ask have left, and keeps what came out in their requests."""
        steps = min(request.left for request in asking.values())
        first = next(iter(asking.values()))
        carries, rows, own = [], [], []
        try:
            for index in range(self.count):
                request = asking.get(index)
                carry = first if request is None else request
                # What is donated cannot be given twice, so that a place without a run gets a copy.
                carries.append(carry.carry if request is not None else _copy(first.carry))
                rows.append(carry.data[1])
                own.append(carry.data[2])
            states, metrics = zip(*carries, strict=True)
            program = self._program_of(first.feed)
            found = program(states, metrics, self._columns, tuple(rows), tuple(own), np.int32(steps))
        except Exception as error:
            for index, request in asking.items():
                reason = error if self._has_run else _as_reason(error, self.count)
                self._requests[index] = request._replace(error=reason)
            return
        self._has_run = True
        for index, request in asking.items():
            self._requests[index] = request._replace(carry=found[index], left=request.left - steps)

    def _program_of(self, feed: Resident) -> Callable[..., Any]:
        if self._program is None:
            assert feed.many_steps is not None
            self._program = feed.devices.compile(_batched(feed.many_steps), (0, 0, 0, 0, 0, None))
        return self._program

    def refuse_other_program(self, trainer: Trainer) -> None:
        """Raises NotTogether if an experiment differs from that of the first run in more than the seed."""
        with self._changed:
            if self._experiment is None:
                self._experiment = trainer.experiment
            same_seed = dataclasses.replace(trainer.experiment, seed=self._experiment.seed)
            if found := differences(self._experiment.to_json(), same_seed):
                raise NotTogether(f"--seeds-together: {found[0]}; expected runs that differ in their seed alone")

    def share_columns(self, columns: Any) -> Any:
        """The columns that all runs train on, held once. Raises NotTogether if these are others."""
        with self._changed:
            if self._columns is None:
                self._columns = columns
            elif not _equal(self._columns, columns):
                raise NotTogether(
                    "--seeds-together: the training rows of the seeds differ; expected data that depends on no seed"
                )
            return self._columns


@dataclass(frozen=True)
class Place:
    """The place of one run in the program of `SeedsTogether`: what `fit` takes as `shared`."""

    together: SeedsTogether
    index: int

    @property
    def text(self) -> str:
        """Which of how many places, counted from 1: what the bits of the run depend on."""
        return f"{self.index + 1} of {self.together.count}"

    def feed(self, own: Feed, trainer: Trainer) -> Feed:
        """The feed whose dispatches are those of all runs. Raises NotTogether if they cannot be."""
        require_together(trainer)
        if not isinstance(own, Resident) or own.many_steps is None:
            raise NotTogether(
                "--seeds-together: an earlier session of this run made a dispatch for each step; expected another "
                "--workdir"
            )
        self.together.refuse_other_program(trainer)
        return _SharedFeed(self, own)

    def leave(self) -> None:
        """See `SeedsTogether.leave`."""
        self.together.leave(self.index)

    @property
    def has_ended(self) -> bool:
        """Whether a run of the group raised, so that the others save and stop."""
        return self.together._ended.is_set()

    def end(self, info: StepInfo) -> Pause | None:
        """A hook that pauses this run after another of the group raised."""
        return Pause("a run of another seed ended the trial") if self.has_ended else None


class _SharedFeed:
    """A feed whose dispatches are those of all runs; see `Feed`."""

    def __init__(self, place: Place, own: Resident):
        self._place, self._own = place, own
        own.columns = place.together.share_columns(own.columns)

    def run(self, state: TrainState, metrics: Metrics, first: int, count: int) -> tuple[TrainState, Metrics]:
        """See `Feed.run`."""
        request = _Request(self._own, (state, metrics), self._own.data(first), count)
        return self._place.together.dispatch(self._place.index, request)

    def batch(self, step: int) -> dict[str, jax.Array]:
        """See `Feed.batch`."""
        return self._own.batch(step)

    def close(self) -> None:
        """See `Feed.close`."""
        self._own.close()


def _batched(many_steps: Callable[..., Any]) -> Callable[..., Any]:
    """`many_steps` for all places: takes and returns a tuple with an entry for each, but for columns and count."""

    def together(states: Any, metrics: Any, columns: Any, rows: Any, own: Any, count: Any) -> Any:
        over_seeds = jax.vmap(many_steps, in_axes=(0, 0, None, 0, 0, None))
        found = over_seeds(_stacked(states), _stacked(metrics), columns, _stacked(rows), _stacked(own), count)
        return tuple(jax.tree.map(lambda x, i=i: x[i], found) for i in range(len(states)))

    return together


def _stacked(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@jax.jit
def _copy(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)


def _equal(a: Any, b: Any) -> bool:
    same = a.keys() == b.keys() and all((x.shape, x.dtype) == (b[name].shape, b[name].dtype) for name, x in a.items())
    return bool(same and all(np.asarray(x).tobytes() == np.asarray(b[name]).tobytes() for name, x in a.items()))


def _as_reason(error: Exception, count: int) -> Exception:
    """The error of a shared dispatch, as each run raises it: of one that cannot be batched, the reason."""
    if isinstance(error, NOT_BATCHED) and not isinstance(error, NotTogether):
        why = str(error).strip().partition("\n")[0]
        return NotTogether(f"--seeds-together: one program of {count} seeds cannot be made ({why:.300})")
    return error
