"""pocket-domain-signs: designs by their number, held-out ones, answers derived once more from the carrier."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from mllmcl import streams
from mllmcl.assets import asset
from mllmcl.streams import drawing, pocket_domain_signs

from .marks import NEEDS_NPM, NEEDS_RESVG


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    for meaning in pocket_domain_signs.MEANINGS:
        for number in (10, 9, 2, 11, 1):
            (tmp_path / f"{meaning}--g{number}.svg").touch()
    monkeypatch.setattr(pocket_domain_signs, "asset", lambda name: tmp_path)
    pocket_domain_signs.designs.cache_clear()
    yield
    pocket_domain_signs.designs.cache_clear()


def test_designs_are_in_the_order_of_their_numbers(made_up):
    """As text g10 would come before g2."""
    pools = {part: pocket_domain_signs.sign_pools(part) for part in ("train", "test")}
    assert [path.stem for path in pools["train"]["stop"]] == [f"regulatory--stop--g{number}" for number in (1, 2, 9)]
    assert [path.stem for path in pools["test"]["stop"]] == ["regulatory--stop--g10", "regulatory--stop--g11"]
    assert len(pools["train"]) == len(pools["test"]) == 12 and "low flying aircraft" in pools["test"]


@NEEDS_RESVG
def test_svg_pictures_are_cut_and_scaled(tmp_path):
    """A red shape in an empty picture, twice as high as wide and without its lower right corner."""
    path = tmp_path / "a.svg"
    path.write_text(
        '<svg xmlns="http://www.w3.org/2000/svg" width="24" height="24"><path fill="#f00" d="M6 4h5v5h-2v5h-3z"/></svg>'
    )
    picture = drawing.svg_picture(path, 40)
    assert picture.mode == "RGBA" and abs(picture.width - 20) <= 1 and picture.height == 40
    assert picture.getpixel((5, 30)) == (255, 0, 0, 255) and picture.getpixel((17, 30))[3] == 0
    ground = Image.new("RGB", (64, 64), (0, 0, 255))
    pasted = np.asarray(drawing.paste_picture(ground, picture, np.random.default_rng(0), turn=0.0)).astype(int)
    red = pasted[:, :, 0] > 200
    # its rim is half transparent
    assert 0.8 * 38 * 18 <= red.sum() <= 0.8 * 40 * 20 and np.ptp(np.nonzero(red)[0]) >= 37
    # nothing but the two colours and what lies between them
    assert (pasted[:, :, 1] == 0).all() and (abs(pasted[:, :, 0] + pasted[:, :, 2] - 255) <= 1).all()


def facts(samples, key):
    return {sample.metadata[key] for sample in samples}


@pytest.mark.network
@NEEDS_NPM
@NEEDS_RESVG
class TestStream:
    def test_order(self, domain_signs, domain):
        assert [task.name for task in domain_signs.tasks] == [task.name for task in domain.tasks]
        chosen = streams.load("pocket-domain-signs", tasks=["science", "driving", "medical"])
        assert [task.name for task in chosen.tasks] == ["science", "driving", "medical"]
        assert chosen.name == "pocket-domain-signs" and chosen.note == domain_signs.note

    def test_all_but_driving_is_as_in_pocket_domain(self, domain_signs, domain):
        for task, easy in zip(domain_signs.tasks, domain.tasks, strict=True):
            for samples, others in ((task.train, easy.train), (task.test, easy.test)):
                equal = [
                    (a.question, a.answer) == (b.question, b.answer) and np.array_equal(a.image, b.image)
                    for a, b in zip(samples, others, strict=True)
                ]
                assert not any(equal) if task.name == "driving" else all(equal)

    def test_meanings_are_those_of_the_files_and_the_last_designs_are_held_out(self, domain_signs):
        task = domain_signs.task("driving")
        assert len({sample.answer for sample in task.test}) == 12
        numbers: dict[str, list[int]] = {}
        for path in asset("traffic-signs").glob("*.svg"):
            meaning, _, number = path.stem.rpartition("--g")
            numbers.setdefault(meaning, []).append(int(number))
        for samples, part in ((task.train, slice(-2)), (task.test, slice(-2, None))):
            used: dict[str, set[int]] = {}
            for sample in samples:
                meaning, _, number = sample.metadata["sign"].rpartition("--g")
                assert sample.answer.split() == meaning.split("--")[1].split("-")
                used.setdefault(meaning, set()).add(int(number))
            assert set(used) == set(pocket_domain_signs.MEANINGS)
            for meaning, found in used.items():
                assert len(numbers[meaning]) >= 3 and found == set(sorted(numbers[meaning])[part]), meaning
        assert not facts(task.train, "sign") & facts(task.test, "sign")
        assert not facts(task.train, "photo") & facts(task.test, "photo")

    def test_the_sign_is_in_the_picture(self, domain_signs):
        """Grass and gravel are gray: the colours of the picture are those of the sign, in the same shares."""
        import resvg_py

        shown, drawn = [], []
        for sample in domain_signs.task("driving").test:
            path = asset("traffic-signs") / f"{sample.metadata['sign']}.svg"
            data = resvg_py.svg_to_bytes(svg_string=path.read_text(), width=96)
            sign = Image.open(io.BytesIO(data)).convert("RGBA")
            picture = np.asarray(Image.alpha_composite(Image.new("RGBA", sign.size, (128, 128, 128)), sign))
            if sample.metadata["photo"] != "rocket" and (found := hues(picture[:, :, :3])) is not None:
                drawn.append(found)
                shown.append(hues(sample.image))
        assert len(shown) > 50
        distances = np.abs(np.stack(shown)[:, None] - np.stack(drawn)[None]).sum(2)
        own = np.diagonal(distances)
        assert np.median(own) < 0.1 and own.max() < 0.6 and np.median(distances) > 0.3


def hues(image) -> np.ndarray | None:
    """Shares of six hues among the coloured pixels; None where there are few."""
    hue, saturation, value = np.asarray(Image.fromarray(image).convert("HSV")).astype(int).transpose(2, 0, 1)
    mask = (saturation > 90) & (value > 40)
    if mask.mean() < 0.03:
        return None
    return np.bincount(((hue[mask] + 21) // 43) % 6, minlength=6) / mask.sum()
