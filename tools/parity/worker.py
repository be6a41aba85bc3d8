"""What a worker process of a sweep does: it runs points that share XLA's flags, on one device."""

import os
import time
from collections.abc import Callable, Iterator
from typing import Any

from qwen_jax.weights import open_model
from stages.errors import UserError
from tools.parity.child import ask
from tools.parity.grid import Point

# On the CPU these two make compiled equal to un-jitted byte for byte, at some cost in speed: no
# fused multiply-add (AVX has none), and one GEMM and reduction library instead of two.
REFERENCE = ("--xla_cpu_max_isa=AVX", "--xla_cpu_experimental_ynn_fusion_type=")

# What a point's flags add to the user's own.
CPU_FLAGS = {
    "reference": REFERENCE,
    "no-fma": ("--xla_cpu_max_isa=AVX",),
    "no-ynn": ("--xla_cpu_experimental_ynn_fusion_type=",),
    "default": (),
}


def environment(flags: str, excess: bool) -> dict[str, str]:
    """The environment of a worker: the user's, with the flags that the sweep varies its own."""
    ours = [*CPU_FLAGS[flags], f"--xla_allow_excess_precision={str(excess).lower()}"]
    varied = ("--xla_cpu_max_isa=", "--xla_cpu_experimental_ynn_fusion_type=",
              "--xla_allow_excess_precision=")  # fmt: skip
    kept = [f for f in os.environ.get("XLA_FLAGS", "").split() if not f.startswith(varied)]
    changed = {
        "XLA_FLAGS": " ".join([*kept, *ours]),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # two processes share a GPU
    }
    gone = ("JAX_PLATFORMS", "JAX_DEFAULT_MATMUL_PRECISION")
    return {k: v for k, v in os.environ.items() if k not in gone} | changed


Row = dict[str, Any]


class Worker:
    """Runs points of one flag set on one device.

    Arguments:
        job: {"device", "model", "tokens", "aot"}.
    """

    def __init__(self, job: Row) -> None:
        from qwen_jax import runtime

        self.job = job
        runtime.for_a_command(job["device"])
        self.device = runtime.pick_device(job["device"])
        if job["device"] == "cpu":
            self.cpu = self.device
        else:
            import jax

            self.cpu = jax.devices("cpu")[0]
        self.model = open_model(job["model"])
        if job.get("aot"):
            from tools.parity.gpu.compile import device

            self.target = device(job["aot"])
        self.kept: tuple[Any, Any] = (None, None)
        self.local: dict[tuple[str, str], Row] = {}

    def describe(self) -> Row:
        from qwen_jax import runtime

        found = runtime.describe(self.device)
        if self.job.get("aot"):
            from tools.parity.gpu.compile import versions

            found |= {"compiled_for": self.job["aot"]}
            found["versions"] |= versions()
        return found

    def batch(self, point: Point) -> Any:
        from tools.parity.programs import make_batch

        return make_batch(tuple(self.job["tokens"]), point.length, point.batch)

    def engine(self, point: Point) -> Any:
        """Fresh programs for a point."""
        from tools.parity import programs, variants

        if point.loop == "layer":
            arch = self.model.config.arch
            variant = variants.variant(arch, point.attention, point.plant, point.products)
            return programs.Layers(self.model, point.dtype, "xla", self.device, variant)
        form = "unobserved" if point.trial == "unobserved" else point.loop
        return programs.Whole(self.model, point.dtype, self.device, form)

    def candidate(self, point: Point) -> Callable[..., Any]:
        """A fresh program for a point; called with a batch it gives the values."""
        import jax

        made = self.engine(point)

        def run(*args: Any) -> Any:
            with jax.default_matmul_precision(point.precision):
                return made.values(*args)

        return run

    def traces(self, values: Any, point: Point) -> list[Any]:
        from tools.parity.memory import sequences

        return sequences(values, self.batch(point), self.model, point.dtype)

    def reference(self, point: Point) -> list[Any]:
        """The un-jitted run on the CPU; the last one is kept, as points come sorted by it."""
        import jax

        from tools.parity import programs, variants

        key = point.dtype, point.length, point.batch
        if self.kept[0] != key:
            self.kept = (None, None)
            variant = variants.variant(self.model.config.arch, "stages", "")
            engine = programs.Layers(self.model, point.dtype, "eager", self.cpu, variant)
            with jax.default_matmul_precision("highest"):
                self.kept = key, self.traces(engine.values(self.batch(point)), point)
        return self.kept[1]

    def measured(self, traces: list[Any], point: Point, digest: str) -> Row:
        """Local error; the same bytes are replayed once."""
        from tools.parity.measure import local

        key = digest, point.precision
        if key not in self.local:
            self.local[key] = local(traces, self.model, point, self.job["device"]).to_json()
        return self.local[key]

    def row(self, point: Point) -> Row:
        """What is found out about one point."""
        if self.job.get("aot"):
            return self.compiled(point)
        if point.trial != "reference":
            return getattr(self, f"trial_{point.trial}")(point)
        from tools.parity.measure import agreement, hashes

        found = self.traces(self.candidate(point)(self.batch(point)), point)
        both = agreement(found, self.reference(point))
        digest = str(sorted(hashes(found).items()))
        local = self.measured(found, point, digest)
        result = both.to_json() | local
        if local["faults"] or both.unmatched:  # what un-jitted does as well can be a fault too
            verdict = "fault"
        else:
            verdict = "identical" if result["identical"] else "precision"
        return {"verdict": verdict} | result

    def compiled(self, point: Point) -> Row:
        """The programs of a point, compiled for a GPU and checked."""
        import jax

        from tools.parity.gpu.check import check
        from tools.parity.gpu.compile import compiled

        arch, programs, violations = self.model.config.arch, [], []
        for part in self.engine(point).programs(self.batch(point)):
            summed = any(arch.stage[name].kind.sums_products for name in part.stages)
            for by in ("cuBLAS", "Triton") if summed else ("Triton",):
                with jax.default_matmul_precision(point.precision):
                    made = compiled(part, self.target, triton=by == "Triton")
                found = check(part, made, arch, (point.dtype, point.precision)).to_json()
                violations += [each | {"products": by} for each in found.pop("violations")]
                programs.append({"program": part.name, "products_by": by} | found)
        verdict = "violation" if violations else "checked"
        return {"verdict": verdict, "violations": violations, "programs": programs}

    def against(self, first: Any, second: Any, point: Point) -> Row:
        """Two runs of a trial compared; the first is the reference."""
        from tools.parity.measure import agreement

        both = agreement(self.traces(second, point), self.traces(first, point))
        return self.judged(both, point)

    @staticmethod
    def judged(both: Any, point: Point) -> Row:
        sound = "precision" if both.within(point.dtype) else "fault"
        found = both.to_json()
        return {"verdict": "identical" if found["identical"] else sound} | found

    def trial_rerun(self, point: Point) -> Row:
        run, batch = self.candidate(point), self.batch(point)
        return self.against(run(batch), run(batch), point)

    def trial_recompiled(self, point: Point) -> Row:
        import jax

        batch = self.batch(point)
        first = self.candidate(point)(batch)
        jax.clear_caches()
        return self.against(first, self.candidate(point)(batch), point)

    def trial_captured(self, point: Point) -> Row:
        run, batch = self.candidate(point), self.batch(point)
        return self.against(run(batch), run(batch, lambda stage, layer: False), point)

    def trial_stages(self, point: Point) -> Row:
        """Each stage captured alone: its values and the logits against those of one full run."""
        run, batch = self.candidate(point), self.batch(point)
        full, alone = run(batch), dict[Any, Any]()
        arch = self.model.config.arch
        for name in arch.names:
            found = run(batch, lambda stage, layer, name=name: stage == name)
            if name != arch.head.name:
                row = self.against({k: v for k, v in full.items() if k in found}, found, point)
                if not row["identical"]:
                    return row | {"captured": name}
            alone |= found
        return self.against(full, alone, point)

    def trial_unobserved(self, point: Point) -> Row:
        from tools.parity.programs import Whole

        batch = self.batch(point)
        observed = Whole(self.model, point.dtype, self.device, "program").values(batch)
        return self.against(observed, self.candidate(point)(batch), point)

    def trial_process(self, point: Point) -> Row:
        return self._elsewhere(point, None)

    def trial_threads(self, point: Point) -> Row:
        if not hasattr(os, "sched_setaffinity"):
            return {"verdict": "not run", "why": "this system cannot bind a process to one core"}
        here = len(os.sched_getaffinity(0))
        if here < 2:
            return {"verdict": "not run", "why": "this process has only one core"}
        return self._elsewhere(point, 1) | {"threads": [here, 1]}

    def _elsewhere(self, point: Point, cores: int | None) -> Row:
        """The same point in a second process, bound to ``cores`` cores."""
        try:
            there = ask(values, self.job, point, cores=cores)
        except EOFError as error:
            raise RuntimeError(f"the second process {error}") from None
        return self.against(self.candidate(point)(self.batch(point)), there, point)


# --- what runs in a process of its own


def machine(job: Row) -> Iterator[Row]:
    """The device, flags and versions; or why there is none, as "refused"."""
    try:
        yield Worker(job).describe()
    except UserError as error:
        yield {"refused": str(error)}


def rows(job: Row, points: list[Point]) -> Iterator[Row]:
    """The row of each point."""
    worker = Worker(job)
    for point in points:
        began = time.perf_counter()
        try:
            row = worker.row(point)
        except UserError as error:
            row = not_run(point, str(error))
        except Exception as error:  # one point that XLA refuses must not end the sweep
            first, *_ = str(error).strip().splitlines() or ["it said nothing"]
            row = not_run(point, f"{type(error).__name__}: {first}")
        yield row | {"key": point.key, "seconds": round(time.perf_counter() - began, 2)}


def values(job: Row, point: Point) -> Iterator[Any]:
    """The values of a point's candidate."""
    worker = Worker(job)
    yield worker.candidate(point)(worker.batch(point))


def not_run(point: Point, why: str) -> Row:
    """The row of a point at which something went wrong: it is tried again next time."""
    return {"key": point.key, "verdict": "not run", "why": why[:300], "failed": True}
