"""Each kind of mistake becomes its exception, names its argument, and leaves outputs as they were."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from typing import Any

import compactattn
import numpy as np
import pytest
from cases import Case
from compactattn import errors

Inputs = dict[str, Any]
NAMES = ("q", "k_cache", "v_cache", "block_table", "seq_lens", "cu_seqlens_q")


def set_to(name: str, value: Any) -> Callable[[Inputs], None]:
    return lambda x: x.update({name: value(x[name]) if callable(value) else value})


def put(name: str, index: Any, value: int) -> Callable[[Inputs], None]:
    return lambda x: x[name].__setitem__(index, value)


def misaligned(x: Any) -> Any:
    """The same numbers, 4 bytes off a 16-byte boundary."""
    room = np.zeros(x.size + 8, x.dtype)
    skip = (room.ctypes.data // 4 + 3) % 4 * -1 % 4
    return room[skip + 1 : skip + 1 + x.size].reshape(x.shape)


MISTAKES = [
    ("E_SHAPE", "q", set_to("q", lambda x: x[0])),
    ("E_SHAPE", "k_cache", set_to("k_cache", lambda x: x[0])),
    ("E_SHAPE", "batch.v", set_to("v_cache", lambda x: x[:-1])),
    ("E_SHAPE", "batch.v", set_to("v_cache", lambda x: x[:, :, :1])),
    ("E_SHAPE", "num_q_heads", set_to("q", lambda x: np.repeat(x[:, :1], 5, axis=1))),
    ("E_SHAPE", "cu_seqlens_q", set_to("cu_seqlens_q", lambda x: x[:-1])),
    ("E_SHAPE", "block_table", set_to("block_table", lambda x: x[:1])),
    ("E_DTYPE", "batch.k", set_to("k_cache", lambda x: x.astype(np.float16))),
    ("E_DTYPE", "seq_lens", set_to("seq_lens", lambda x: x.astype(np.int64))),
    ("E_DTYPE", "seq_lens", set_to("seq_lens", lambda x: x.astype(np.float32))),
    ("E_STRIDE", "batch.q", set_to("q", lambda x: x[::-1])),
    ("E_STRIDE", "batch.q", set_to("q", lambda x: np.repeat(x, 2, axis=2)[:, :, ::2])),
    ("E_STRIDE", "batch.k", set_to("k_cache", lambda x: np.broadcast_to(x[:1], x.shape))),
    ("E_ALIGN", "batch.q", set_to("q", misaligned)),
    ("E_VALUE", "cu_seqlens_q[1]", put("cu_seqlens_q", 1, -1)),
    ("E_VALUE", "cu_seqlens_q[2]", put("cu_seqlens_q", 2, 22)),
    ("E_SEQLEN", "seq_lens[0]", put("seq_lens", 0, -5)),
    ("E_SEQLEN", "seq_lens[1]", put("seq_lens", 1, 10**6)),
    ("E_TABLE", "block_table[0][1]", put("block_table", (0, 1), 10**6)),
    ("E_TABLE", "block_table[1][0]", put("block_table", (1, 0), -1)),
    ("E_UNSUPPORTED", "head_dim", lambda x: x.update({n: x[n][..., :48].copy() for n in NAMES[:3]})),
    ("E_UNSUPPORTED", "page_size", lambda x: x.update({n: x[n][:, :1].copy() for n in NAMES[1:3]})),
    ("E_NULL", "k_cache", set_to("k_cache", None)),
]


@pytest.mark.parametrize(("name", "argument", "spoil"), MISTAKES, ids=lambda x: x if isinstance(x, str) else "")
def test_a_mistake_is_named_and_changes_nothing(name: str, argument: str, spoil: Any) -> None:
    inputs = dict(zip(NAMES, Case([(4, 20), (19, 60)]).inputs(), strict=True))
    out, lse = np.full((23, 4, 64), 7, np.float32), np.full((4, 23), 7, np.float32)
    spoil(inputs)
    with pytest.raises(ValueError) as caught:
        compactattn.forward(*inputs.values(), out=out, lse=lse)
    error = caught.value
    assert isinstance(error, compactattn.InvalidArgument)
    assert isinstance(error, compactattn.Unsupported) == (name == "E_UNSUPPORTED")
    assert error.name == name and str(error).startswith(f"{name}: ") and argument in str(error)
    assert len(str(error)) <= 300 and str(error).isascii()
    assert (out == 7).all() and (lse == 7).all()


@pytest.mark.parametrize(
    ("name", "argument", "options"),
    [
        ("E_SHAPE", "out", {"out": np.zeros((22, 4, 64), np.float32)}),
        ("E_DTYPE", "out", {"out": np.zeros((23, 4, 64), np.float16)}),
        ("E_SHAPE", "lse", {"lse": np.zeros((23, 4), np.float32)}),
        ("E_VALUE", "sm_scale", {"sm_scale": -1.0}),
        ("E_VALUE", "sm_scale", {"sm_scale": 0.0}),
        ("E_VALUE", "sm_scale", {"sm_scale": float("nan")}),
        ("E_VALUE", "mode", {"settings": "sparse"}),
    ],
)
def test_wrong_options_are_named(name: str, argument: str, options: dict[str, Any]) -> None:
    with pytest.raises(compactattn.InvalidArgument, match=argument) as caught:
        compactattn.forward(*Case([(4, 20), (19, 60)]).inputs(), **options)
    assert caught.value.name == name


def test_out_may_not_overlap_an_input() -> None:
    inputs = Case([(4, 20)]).inputs()
    before = inputs[0].copy()
    with pytest.raises(compactattn.InvalidArgument, match=r"E_ALIAS: .*out"):
        compactattn.forward(*inputs, out=inputs[0])
    assert np.array_equal(inputs[0], before)


@pytest.mark.parametrize(
    ("changes", "argument"),
    [
        ({"block_size": 48}, "block_size"),
        ({"block_size": 2**32 + 128}, "settings.block_size"),
        ({"block_size": 1.5}, "settings.block_size"),
        ({"keep_value": 0.0}, "keep"),
        ({"keep_value": "much"}, "settings.keep_value"),
        ({"keep": "all"}, "settings.keep"),
        ({"selector": "best"}, "settings.selector"),
        ({"min_density": 0.9}, "min_density"),
    ],
)
def test_wrong_settings_are_named(changes: dict[str, Any], argument: str) -> None:
    settings = compactattn.Settings.mode("compactattn").replace(**changes)
    with pytest.raises(compactattn.InvalidArgument, match=argument):
        compactattn.forward(*Case([(4, 20)]).inputs(), settings=settings)


def test_settings_survive_the_way_through_c() -> None:
    for selector in ("dense", "flashprefill", "quoka", "two_level"):
        settings = compactattn.Settings.of(selector)
        assert compactattn.Settings.from_c(settings.to_c()) == settings


def test_settings_come_from_the_environment_when_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.delenv("COMPACTATTN_CONFIG", raising=False)
    monkeypatch.setenv("COMPACTATTN_MODE", "compactattn")
    assert compactattn.Settings.from_env() == compactattn.Settings.mode("compactattn")
    (tmp_path / "c.json").write_text('{"layers": {"3": {"keep_density": 0.25}}}')
    monkeypatch.setenv("COMPACTATTN_CONFIG", str(tmp_path / "c.json"))
    third = compactattn.Settings.from_env(3)
    assert (third.keep, third.keep_value) == ("density", 0.25)
    monkeypatch.setenv("COMPACTATTN_MODE", "fast")
    with pytest.raises(compactattn.InvalidArgument, match="E_CONFIG"):
        compactattn.Settings.from_env()


def test_unserved_devices_are_no_mistake_of_the_caller() -> None:
    # Without a driver, or in a build without kernels; on a machine that has both there is nothing to refuse.
    try:
        compactattn.Context("cuda:0")
    except compactattn.DeviceError as error:
        assert 100 <= error.status < 200 and not isinstance(error, ValueError)
    for device in ("gpu", "cuda:x", "cpu:1"):
        with pytest.raises(compactattn.InvalidArgument, match="device"):
            compactattn.Context(device)


def test_supports_tells_the_reason_beforehand() -> None:
    desc = compactattn.plan_for(compactattn.Batch.of(*Case([(4, 20)]).inputs())).desc
    assert compactattn.Plan.supports(desc) is None
    for name, value in (("sliding_window", 128), ("head_dim", 80), ("alibi", True), ("attention_sinks", True)):
        reason = compactattn.Plan.supports(type(desc)(**{**vars(desc), name: value}))
        assert reason is not None and reason.startswith("E_UNSUPPORTED: ") and name in reason


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (1, compactattn.InvalidArgument),
        (8, compactattn.Unsupported),
        (23, compactattn.InvalidArgument),
        (100, compactattn.DeviceError),
        (106, compactattn.DeviceError),
        (108, compactattn.OutOfMemory),
        (200, compactattn.InternalError),
        (201, compactattn.InternalError),
    ],
)
def test_every_range_of_codes_has_its_exception(status: int, kind: type[Exception]) -> None:
    error = errors.of_status(status, "E_X", "E_X: text")
    assert type(error) is kind
    assert isinstance(error, ValueError) == (status < 100)
    assert isinstance(error, MemoryError) == (status == 108)
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), again.status, again.name, str(again)) == (kind, status, "E_X", "E_X: text")


def test_a_forked_child_has_plans_of_its_own_and_is_refused_its_parents() -> None:
    case = Case([(4, 20)])
    inputs = case.inputs()
    plan = compactattn.plan_for(compactattn.Batch.of(*inputs))
    child = os.fork()
    if child == 0:
        try:
            plan.stats()
        except compactattn.InvalidArgument as error:
            refused = error.name == "E_WRONG_PROCESS"
        os._exit(0 if refused and np.isfinite(compactattn.forward(*inputs)).all() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
