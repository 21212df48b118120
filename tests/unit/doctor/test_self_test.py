"""The self-test passes where the numbers are right, and fails where they are not."""

import math
import sys

import pytest
import torch

from diffdpo.doctor import cases, self_test
from diffdpo.doctor.cases import CASES, Case
from diffdpo.models.architecture.layout import Layout

CPU = torch.device("cpu")
FAST = [case for case in CASES if not case.scorer.get("compile_blocks")]


def states(given):
    return {line.case: line.state for line in self_test.self_test(CPU, given)}


def test_a_sample_of_the_cases_passes():
    sample = [
        case for case in FAST if case.name in ("fp32, deferred", "fp32, block-causal attention", "NF4 + LoRA in fp32")
    ]
    assert len(sample) == 3
    for line in self_test.self_test(CPU, sample):
        assert line.state == self_test.PASSED, line
        assert all(0 < line.off[name] <= line.allowed[name] for name in line.off)


@pytest.mark.slow
def test_all_cases_pass_or_say_what_is_missing():
    for line in self_test.self_test(CPU):
        assert line.state == self_test.PASSED or (line.state == self_test.SKIPPED and line.note), line


def test_wrong_attention_fails(monkeypatch):
    right = Layout.attend
    monkeypatch.setattr(Layout, "attend", lambda self, q, k, v: right(self, q, k.roll(1, 0), v))
    # the padded layout of the exact model attends by the same function: only the tried one may be wrong
    monkeypatch.setattr(
        Layout, "attend", lambda self, q, k, v: right(self, q, k if q.dtype == torch.float64 else k.roll(1, 0), v)
    )
    (line,) = self_test.self_test(CPU, [Case("fp32")])
    assert line.state == self_test.FAILED and line.off["score"] > 100 * line.allowed["score"]


def test_a_kernel_that_raises_or_gives_nan_fails_and_the_rest_goes_on(monkeypatch):
    right = Layout.attend

    def raises(self, q, k, v):
        if q.dtype == torch.bfloat16:
            raise RuntimeError("CUDA error: no kernel image is available\nmore")
        return right(self, q, k, v) * (math.nan if q.dtype == torch.float32 else 1)

    monkeypatch.setattr(Layout, "attend", raises)
    nan, raised = self_test.self_test(CPU, [Case("fp32"), Case("bf16", "bfloat16")])
    assert nan.state == raised.state == self_test.FAILED
    assert "no kernel image" in raised.note and "more" not in raised.note


def test_what_cannot_be_tried_here_is_skipped_with_the_reason(monkeypatch):
    monkeypatch.setattr(cases, "fault_of", lambda name: f"{name} is not installed")
    (nf4, liger) = self_test.self_test(CPU, [Case("n", nf4=True), Case("l", scorer={"use_liger": True})])
    assert nf4.state == liger.state == self_test.SKIPPED and "bitsandbytes" in nf4.note and "GPU" in liger.note


@pytest.mark.parametrize("fails", [False, True])
def test_the_exit_code(monkeypatch, capsys, fails):
    from diffdpo.cli import doctor
    from diffdpo.doctor import software
    from diffdpo.doctor.imports import Imports

    monkeypatch.setattr(software, "begin_imports", lambda: Imports([]))  # all of them take seconds
    monkeypatch.setattr(self_test, "CASES", ())
    line = self_test.Compared("x", self_test.FAILED if fails else self_test.PASSED, {}, {}, 0.0)
    monkeypatch.setattr(self_test, "self_test", lambda device: [line])
    monkeypatch.setattr(sys, "argv", ["diffdpo doctor"])
    assert doctor.main(["--self_test", "--device", "cpu"]) == int(fails)
    assert f"{int(fails)} of 1 failed" in capsys.readouterr().out
