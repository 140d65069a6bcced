"""Profiles on disk: what is written is read back; everything damaged or foreign is refused with a clear error."""

import json
from pathlib import Path

import pytest
import torch

from compress.data.sample import TextSample
from compress.errors import UserError
from compress.models.shape import shape_of
from compress.partial import write_partial
from compress.profile import store
from compress.profile.heads.attention import Attention
from compress.profile.heads.influence import Influence
from compress.profile.heads.retrieval import Retrieval
from compress.profile.key import Key
from compress.profile.partial import NAME as PARTIAL
from compress.profile.run import run_key, run_profile
from compress.profile.store import HEADER, TENSORS, Profile, read_profile, write_profile
from compress.profile.sums import Sheet
from compress.targets.window import SpanGrid
from tests.profile.common import GRID, document, documents, subject_of, tensor_bytes
from tests.tiny import tiny_loaded, tiny_model


@pytest.fixture
def profile(tmp_path: Path) -> Profile:
    return run_profile(
        tiny_loaded("llama-gqa"),
        documents(),
        [Influence(grid=GRID), Retrieval(grid=GRID)],
        tmp_path / "profile",
        seed=7,
    )


def test_written_is_read(profile: Profile) -> None:
    shape = shape_of(tiny_model("llama-gqa"))
    again = read_profile(profile.folder, shape)
    assert again.header == profile.header and again.lengths == (70, 133) and again.grid == GRID
    assert again.header.seed == 7 and again.header.seconds > 0 and again.header.peak_memory_bytes > 1 << 20
    assert again.header.documents == {70: 1, 133: 2} and set(again.header.loss) == {70, 133}
    assert again.tensor(Key("influence", "joint", 133)).shape == (3, 2, 2, 5, len(GRID.alphas(133)))
    assert not (profile.folder / PARTIAL).exists()
    fields = json.loads((profile.folder / HEADER).read_text())
    assert fields["schema"] == 1 and fields["fingerprint"] == shape.fingerprint
    with pytest.raises(UserError, match=r"influence\.joint\.133"):
        again.tensor(Key("influence", "joint", 134))


def test_a_finished_profile_is_not_repeated(profile: Profile) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("profiled again")

    statistics = [Influence(grid=GRID), Retrieval(grid=GRID)]
    loaded = tiny_loaded("llama-gqa")
    again = run_profile(loaded, documents(), statistics, profile.folder, seed=7, progress=refuse)
    assert again.header == profile.header


@pytest.mark.parametrize("change", ["documents", "parameters", "model"])
def test_another_run_starts_afresh(profile: Profile, change: str) -> None:
    texts = documents()
    if change == "documents":
        texts[70].append(document(60, seed=9))
    grid = GRID if change != "parameters" else SpanGrid()
    statistics = [Influence(grid=grid), Retrieval(grid=grid)]
    loaded = tiny_loaded("llama-gqa" if change != "model" else "llama-mha")
    calls: list[int] = []
    again = run_profile(loaded, texts, statistics, profile.folder, seed=7, progress=lambda done, *_: calls.append(done))
    assert calls[0] == 0 and again.header.key != profile.header.key


@pytest.mark.parametrize("damage", ["other run", "flipped byte", "truncated", "empty", "an earlier version"])
def test_an_unusable_partial_file_is_ignored(damage: str, tmp_path: Path) -> None:
    loaded, statistics = tiny_loaded("llama-gqa"), [Retrieval()]
    run_profile(loaded, documents(), statistics, tmp_path / "whole", seed=0)

    def stop(done: int, *_: object) -> None:
        if done == 1:
            raise KeyboardInterrupt

    texts = documents()
    if damage == "other run":
        texts[70] = [document(64, evidence=((3, 5),))]
    with pytest.raises(KeyboardInterrupt):
        run_profile(loaded, texts, statistics, tmp_path / "parts", seed=0, progress=stop)
    path = tmp_path / "parts" / PARTIAL
    data = bytearray(path.read_bytes())
    if damage == "flipped byte":
        data[-5] ^= 1
    elif damage == "truncated":
        del data[100:]
    elif damage == "empty":
        data.clear()
    path.write_bytes(data)
    if damage == "an earlier version":
        beside = path.with_name("importance.partial")
        profile_key = run_key(loaded.shape, torch.float32, texts, statistics)
        for old in (path, beside):
            write_partial(
                old, profile_key, {"done": 1, "seconds": 1.0}, {"retrieval/count:retrieval.70": torch.ones(1)}
            )
    calls: list[int] = []
    run_profile(
        loaded, documents(), statistics, tmp_path / "parts", seed=0, progress=lambda done, *_: calls.append(done)
    )
    assert calls == [0, 1, 2, 3]
    assert not list(path.parent.glob("*.partial"))
    assert tensor_bytes(tmp_path / "parts") == tensor_bytes(tmp_path / "whole")


@pytest.mark.parametrize("cut", [0, 5, 100, -1])
def test_truncated_tensors(profile: Profile, cut: int) -> None:
    path = profile.folder / TENSORS
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UserError, match="truncated") as caught:
        read_profile(profile.folder)
    (problem,) = caught.value.problems
    assert problem.where == str(path) and problem.expected and problem.found and problem.fix


def test_any_flipped_byte_is_noticed(profile: Profile) -> None:
    for name, step in ((HEADER, 61), (TENSORS, 997)):
        path = profile.folder / name
        whole = path.read_bytes()
        for position in range(0, len(whole) - 1, step):
            if whole[position : position + 1].isspace():
                continue  # layout between JSON fields carries nothing
            data = bytearray(whole)
            data[position] ^= 1
            path.write_bytes(data)
            try:
                found = read_profile(profile.folder)
            except UserError:
                continue
            # A digit beyond the precision of a float says nothing else; any other change has to be refused.
            assert name == HEADER and found.header == profile.header, f"{name}, byte {position}"
        path.write_bytes(whole)
    read_profile(profile.folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"schema": 2}', "{}"])
def test_wrong_json(profile: Profile, text: str) -> None:
    (profile.folder / HEADER).write_text(text)
    with pytest.raises(UserError, match=r"profile\.json"):
        read_profile(profile.folder)


@pytest.mark.parametrize("missing", [HEADER, TENSORS, "folder"])
def test_missing_files(profile: Profile, missing: str) -> None:
    folder = profile.folder
    if missing == "folder":
        folder = folder / "nowhere"
    else:
        (folder / missing).unlink()
    with pytest.raises(UserError, match="no such"):
        read_profile(folder)


def test_another_models_profile(profile: Profile) -> None:
    with pytest.raises(UserError) as caught:
        read_profile(profile.folder, shape_of(tiny_model("llama-mha")))
    fields = str(caught.value)
    assert "`kv_heads` differs" in fields and "`fingerprint` differs" in fields
    other_weights = shape_of(tiny_model("llama-gqa", seed=5))
    with pytest.raises(UserError, match="fingerprint") as caught:
        read_profile(profile.folder, other_weights)
    assert len(caught.value.problems) == 1


def test_tensors_that_do_not_fit_the_header(profile: Profile) -> None:
    wrong, joint = dict(profile.tensors), Key("influence", "joint", 70)
    wrong[Key("retrieval", length=70)] = wrong[Key("retrieval", length=70)][:2]
    wrong[joint] = wrong[joint] * float("nan")
    del wrong[Key("retrieval", length=133)]
    write_profile(profile.folder, profile.header, wrong)
    with pytest.raises(UserError) as caught:
        read_profile(profile.folder)
    text = str(caught.value)
    assert len(caught.value.problems) == 3
    assert "retrieval.70" in text and "influence.joint.70" in text and "retrieval.133" in text


def test_header_shapes_that_do_not_fit_the_model(profile: Profile) -> None:
    model = profile.header.model.model_copy(update={"layers": 4})
    write_profile(profile.folder, profile.header.model_copy(update={"model": model}), profile.tensors)
    with pytest.raises(UserError, match="does not fit the model"):
        read_profile(profile.folder)


def test_unknown_key_in_the_header(profile: Profile) -> None:
    path = profile.folder / HEADER
    fields = json.loads(path.read_text())
    fields.pop("checksum")
    fields["extra"] = 1
    fields["checksum"] = store._checksum(fields)
    path.write_text(json.dumps(fields))
    with pytest.raises(UserError, match="extra"):
        read_profile(profile.folder)


def test_a_statistic_that_is_not_finite_is_named() -> None:
    sheet = Sheet([Attention()], subject_of(tiny_model("llama-gqa")), [64, 133])
    sheet.check_finite("document 1")
    sheet.sums[0][133]["mass"][2, 1, 0] = float("inf")
    with pytest.raises(UserError, match=r"statistic `attention` is not finite in layer 2[\s\S]*`mass\.133`"):
        sheet.check_finite("document 1")


def test_all_unsuitable_inputs_are_reported_at_once(tmp_path: Path) -> None:
    texts = {
        64: [document(65), TextSample((5, 6, 7), (0, 2)), TextSample((5, 6, 7), (1, 3), ((2, 9),))],
        32: [TextSample((5, 6, 7), (3, 3))],
    }
    with pytest.raises(UserError) as caught:
        run_profile(tiny_loaded("llama-gqa"), texts, [Retrieval(), Retrieval()], tmp_path, seed=0)
    assert len(caught.value.problems) == 5
    with pytest.raises(UserError, match="no documents"):
        run_profile(tiny_loaded("llama-gqa"), {64: []}, [Retrieval()], tmp_path, seed=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_cuda_equals_cpu(tmp_path: Path) -> None:
    loaded, statistics = tiny_loaded("llama-gqa"), [Influence(grid=GRID), Retrieval(grid=GRID)]
    cpu = run_profile(loaded, documents(), statistics, tmp_path / "cpu", seed=0)
    loaded.model.cuda()
    for checkpointing in (False, True):
        folder = tmp_path / f"cuda{checkpointing}"
        cuda = run_profile(loaded, documents(), statistics, folder, seed=0, checkpointing=checkpointing)
        for key, values in cpu.tensors.items():
            error = float((cuda.tensor(key) - values).abs().max())
            # Two float32 implementations; see MODEL_TOLERANCE in test_influence.py.
            assert error <= 1e-3 * float(values.abs().max())
