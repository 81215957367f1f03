"""Two processes, and four offload orders. A case is a file of the suite, whose tests are this row's."""

from .row import Record, Row, Verdict, failures

FILES = {
    "training/test_processes": "DDP",
    "training/test_sharded": "FSDP2",
    "training/test_launchers": "what is refused before training",
    "layers/test_offload": "offloading before and after apply_dora and patch_peft",
}
LEAST = 4  # tests of each file: the four orders of offloading, and no file that lost its tests


def run(name: str) -> dict:
    from .suite import outcomes

    found = outcomes("-n", "0", f"tests/{name}.py")
    bad = {test: outcome for test, outcome in found.items() if outcome != "passed"}
    assert not bad, f"{bad}"
    assert len(found) >= LEAST, f"{len(found)} tests only"
    return {"tests": len(found)}


def judge(records: list[Record]) -> Verdict:
    failed = failures(records)
    parts = [f"{FILES[r['case']]}: {r.get('tests', 'failed')}" for r in records]
    complete = [record["case"] for record in records] == list(FILES)
    return Verdict(f"tests passed of {', '.join(parts)}", complete and not failed)


ROW = Row(
    what="two-process DDP and FSDP2, four offload orders",
    target="equal, or a clear error before training",
    cases=lambda: list(FILES),
    run=run,
    judge=judge,
)
