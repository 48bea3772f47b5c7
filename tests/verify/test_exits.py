"""What verification says of early exits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import slmtvm
from slmtvm.bundle.write import write_bundle
from slmtvm.passes.pipeline import fuse, lower
from slmtvm.plan.build import build_plan
from slmtvm.target import Target
from slmtvm.verify.cases import make_cases
from slmtvm.verify.exits import compare_exits
from tests.passes.toy import VOCAB
from tests.passes.toy_exits import exiting, quiet_decoder


@pytest.mark.slow
def test_a_report_counts_what_ends_where_and_what_it_costs(tmp_path: Path) -> None:
    model = exiting(quiet_decoder(loudness=0.3), {1: 0.6, 2: 0.3})
    target = Target.load("host")
    info = {"kind": "decoder", "exits": [{"layer": e.layer} for e in model.exits]}
    plan = build_plan(lower(fuse(model), target, "float32"), info)
    write_bundle(tmp_path / "x.slm", [(target, plan)])
    tokens = np.random.default_rng(5).integers(0, VOCAB, 81)
    with slmtvm.load(tmp_path / "x.slm") as session:
        report = compare_exits(session, make_cases(tokens, session.info, 40))
        whole, ended = [], []
        for window in (tokens[:40], tokens[40:80]):
            session.reset()
            whole.append(session.eval_all(window))
            session.reset()
            rows = []
            for token in window:
                rows.append(session.eval([token]))
                ended.append(session.exit_taken)
            whole.append(np.stack(rows))
    assert report is not None and report.tokens == 80 and report.layers == (1, 2)
    assert report.ended == (ended.count(1) / 80, ended.count(2) / 80)
    same = [whole[0].argmax(1) == whole[1].argmax(1), whole[2].argmax(1) == whole[3].argmax(1)]
    assert report.top1 == pytest.approx(np.concatenate(same).mean())
    assert report.ppl != report.ppl_whole and report.speed > 0
    text = str(report)
    assert "after layer 1" in text and f"{report.ppl_whole:.4f} by all layers" in text
    assert report.to_json()["layers"] == (1, 2)
