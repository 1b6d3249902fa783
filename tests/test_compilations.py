"""How many programs a job compiles: none op by op, and no more than a bound for each of its stages."""

import json

from processes import run

# Programs of a stage at most, on a model of one block; what an earlier stage compiled is there already, and while calibration runs
# those of measuring are compiled.
MOST = {"load": 0, "calibrate and measure": 26, "solve": 0, "judge": 1, "refine": 0, "evaluate": 1}
PROGRAM = """
import collections, contextlib, json, logging, re, sys
import jax
from qlr_jax import job
from qlr_jax.run.session import Session
from qlr_jax.settings.recipe import Recipe
stages, of_session = ["begin"], Session.stage

@contextlib.contextmanager
def stage(self, name, title=None):
    stages.append(name)
    with of_session(self, name, title):
        yield
    stages.pop()

Session.stage = stage
found = collections.defaultdict(list)

class Noted(logging.Handler):
    def emit(self, record):
        if program := re.match(r"Finished XLA compilation of jit\\((.*)\\) in", record.getMessage()):
            found[stages[-1]].append(program[1])

jax.config.update("jax_log_compiles", True)
for name in ("jax._src.dispatch", "jax._src.interpreters.pxla", "jax._src.compiler"):
    logging.getLogger(name).addHandler(Noted())
    logging.getLogger(name).propagate = False
recipe = Recipe(
    state_bits=6, search_state_bits=6, ranks=(0, 4), iterations=1, sequences=8, sequence_length=32, measure_tokens=256,
    evaluation_tokens=512, factors=("trellis-2",), refine=1,
)
model, text, out = sys.argv[1:]
job.compress(model, out, "2.25bpw", text, recipe, evaluate_on=text)
print(json.dumps(found))
"""
# Names of JAX's own operations, as a program of one of them is called; the few that a job may have are named.
ALLOWED = {"search"}


def test_no_stage_of_a_job_compiles_more_than_it_needs(tiny, text, tmp_path):
    import jax

    found = json.loads(run(PROGRAM, tiny, text, tmp_path / "out").splitlines()[-1])  # in a process that has compiled nothing
    counts = {stage: len(names) for stage, names in found.items()}
    counts["calibrate and measure"] = counts.pop("calibrate") + counts.pop("measure")
    assert {"round_backbone", "fit_factors"} <= set(found["calibrate"]), "compiled ahead"
    assert all(count <= MOST.get(stage, 0) for stage, count in counts.items()), (counts, found)
    single = {name for names in found.values() for name in names if hasattr(jax.lax, name) or hasattr(jax.numpy, name)}
    assert not single - ALLOWED, f"compiled op by op: {sorted(single - ALLOWED)}"
    assert sum(counts.values()) <= 28
