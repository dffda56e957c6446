"""Composed models: prompts, image features and their cache, backbones by folder and by asset."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, LlamaConfig, LlamaForCausalLM

from mllmcl.models import MLLM, families
from mllmcl.models.composed import IMAGE_TOKEN_ID
from mllmcl.models.families.composed import template_parts
from mllmcl.models.features import image_key
from mllmcl.models.vision import HFVision, load_vision

from .tiny import CHAT_TEMPLATE, Item, PatchMeans, make_composed, make_samples, make_tokenizer, text_options


def test_the_prompt_leaves_the_default_system_turn_out():
    parts = template_parts(make_tokenizer(CHAT_TEMPLATE))
    assert parts == ("<s><|user|>", "</s>\n<|assistant|>\n")
    with pytest.raises(ValueError, match="has no chat_template"):
        template_parts(make_tokenizer())


def test_image_tokens_stand_before_the_question():
    mllm = make_composed()
    batch = mllm.collate(
        [Item(id="a", question="q?", answer="x", image=np.zeros((9, 9, 3), np.uint8))], with_answers=True
    )
    ids = batch.input_ids[0].tolist()
    assert ids.count(IMAGE_TOKEN_ID) == 4
    start = ids.index(IMAGE_TOKEN_ID)
    text = mllm.tokenizer.decode([*ids[:start], *ids[start + 4 :]])
    assert text == "<s><|user|>\nq?</s>\n<|assistant|>\nx</s>"
    assert batch.image_index == (0,) and batch.image_rows == (4,)


def test_projected_features_replace_the_placeholders():
    mllm = make_composed()
    samples = make_samples("composed", 3)
    batch = mllm.collate(samples, with_answers=False)
    with torch.no_grad():
        embeddings = mllm.model.embed(batch.input_ids, batch.inputs["image_features"])
        want = mllm.model.projector(mllm.image_features(samples))
    at_image = batch.input_ids == IMAGE_TOKEN_ID
    torch.testing.assert_close(embeddings[at_image].view_as(want), want)
    table = mllm.model.get_input_embeddings().weight
    assert torch.equal(embeddings[~at_image], table[batch.input_ids[~at_image]])


def test_each_image_is_encoded_once():
    mllm, samples = make_composed(), [sample for sample in make_samples("composed") if sample.image is not None]
    first = mllm.image_features(samples[:4])
    assert first.shape == (4, 4, 12) and not first.requires_grad
    assert mllm.model.vision.num_images == 4
    again = mllm.image_features(samples[::-1])
    assert mllm.model.vision.num_images == len(samples)
    assert torch.equal(again[-4:].flip(0), first)
    assert not first.is_inference(), "features made in inference mode could not enter autograd"
    with pytest.raises(ValueError, match="'t' has none"):
        mllm.image_features([Item(id="t", question="q")])


def test_features_first_made_while_generating_can_train():
    mllm, samples = make_composed(), make_samples("composed")
    mllm.generate(samples, max_new_tokens=1)
    mllm.set_trainable(projector=True)
    mllm.loss(mllm.collate(samples, with_answers=True)).backward()
    assert mllm.model.projector.linear_1.weight.grad.abs().max() > 0


def test_features_on_disk_serve_the_next_run(tmp_path):
    samples = [sample for sample in make_samples("composed") if sample.image is not None]
    one, two, other = make_composed(), make_composed(), make_composed()
    want = one.cache_images(tmp_path).image_features(samples)
    assert torch.equal(two.cache_images(tmp_path).image_features(samples), want)
    assert two.model.vision.num_images == 0
    with torch.no_grad():
        other.model.vision.conv.weight.add_(1)
    assert not torch.equal(other.cache_images(tmp_path).image_features(samples), want)
    assert other.model.vision.num_images == len(samples), "another encoder must not be served these features"
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    for path in tmp_path.iterdir():
        with safe_open(path, framework="pt") as file:
            assert len(list(file.keys())) == len(samples)


def test_image_keys_tell_images_apart(tmp_path):
    array = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    path = tmp_path / "image.png"
    Image.fromarray(array).save(path)
    keys = [
        image_key("e", 4, Item(id="a", question="", image=array)),
        image_key("e", 4, Item(id="b", question="", image=array)),
        image_key("e", 4, Item(id="a", question="", image=array[::-1])),
        image_key("e", 4, Item(id="a", question="", image=array.reshape(2, 8, 3))),
        image_key("f", 4, Item(id="a", question="", image=array)),
        image_key("e", 8, Item(id="a", question="", image=array)),
        image_key("e", 4, Item(id="a", question="", image=path)),
    ]
    assert len(set(keys)) == len(keys)
    assert keys[0] == image_key("e", 4, Item(id="a", question="other", image=array.copy()))


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_vision_features_of_other_families(build, name):
    mllm = build(name)
    samples = [sample for sample in make_samples(name) if sample.image is not None]
    features = mllm.image_features(samples)
    assert features.shape == ((len(samples), 4, 32) if name == "llava" else (len(samples), 1, 32))
    alone = torch.cat([mllm.image_features([sample]).mean(1) for sample in samples])
    torch.testing.assert_close(features.mean(1), alone, rtol=1e-4, atol=1e-5)
    if name == "llava":
        pixels = mllm.collate(samples, with_answers=False).inputs["pixel_values"]
        hidden = mllm.model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        torch.testing.assert_close(features, hidden.detach(), rtol=1e-4, atol=1e-5)


def test_compose_from_folders(tmp_path):
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(text_config=size, vision_config={**size, "image_size": 28, "patch_size": 14})
    CLIPModel(config).save_pretrained(tmp_path / "vision")
    CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(
        tmp_path / "vision"
    )
    tokenizer = make_tokenizer(CHAT_TEMPLATE)
    LlamaForCausalLM(LlamaConfig(**text_options(tokenizer))).save_pretrained(tmp_path / "language")
    tokenizer.save_pretrained(tmp_path / "language")
    mllm = MLLM.compose(vision=str(tmp_path / "vision"), language=str(tmp_path / "language"), select_layer=-2)
    assert isinstance(mllm.model.vision, HFVision)
    samples = make_samples("composed", 4)
    assert mllm.image_features(samples).shape == (4, 4, 16)
    assert len(mllm.generate(samples, max_new_tokens=3)) == 4
    with torch.no_grad():
        pixels = mllm.model.vision.preprocess([sample.load_image() for sample in samples])
        want = mllm.model.vision.model(pixels, output_hidden_states=True).hidden_states[1][:, 1:]
    torch.testing.assert_close(mllm.image_features(samples), want, rtol=1e-4, atol=1e-5)


def test_wrong_parts_are_named():
    language = LlamaForCausalLM(LlamaConfig(**text_options(make_tokenizer())))
    with pytest.raises(ValueError, match="tokenizer: needed"):
        MLLM.compose(vision=PatchMeans(), language=language)
    with pytest.raises(ValueError, match="projector: expected one of mlp2x_gelu, got 'linear'"):
        MLLM.compose(vision=PatchMeans(), language=language, tokenizer=make_tokenizer(), projector="linear")
    with pytest.raises(TypeError, match="Linear lacks preprocess, hidden_size, image_size"):
        load_vision(torch.nn.Linear(1, 1))


def test_families_are_found_by_model_type():
    assert families.find("llava").name == "llava"
    assert families.find("qwen2_5_vl").name == "qwen2_5_vl"
    assert families.find("mllmcl_composed").name == "composed"
    assert families.find("something_new").name == "default"


# -- the real backbones


@pytest.mark.network
def test_efficientnet_lite0_knows_imagenet():
    data = pytest.importorskip("skimage.data")
    from mllmcl.models import efficientnet_lite0

    encoder = efficientnet_lite0.load()
    pixels = encoder.preprocess([Image.fromarray(data.cat()), Image.fromarray(data.coffee())])
    with torch.no_grad():
        probabilities = encoder.classify(pixels).softmax(-1)
        tokens = encoder(pixels)
    assert tokens.shape == (2, 25, 768) and encoder.num_tokens == 25
    # ImageNet classes: 281 tabby, 282 tiger cat, 285 Egyptian cat; 967 espresso, 968 cup, 504 coffee mug
    assert probabilities[0].argmax() in (281, 282, 285) and probabilities[0, [281, 282, 285]].sum() > 0.9
    assert probabilities[1].argmax() == 967 and probabilities[1, [504, 967, 968]].sum() > 0.9


@pytest.mark.network
@pytest.mark.slow
def test_the_pocket_model_knows_a_capital_and_takes_images():
    data = pytest.importorskip("skimage.data")
    pytest.importorskip("gguf")
    torch.manual_seed(0)
    mllm = MLLM.compose(vision="efficientnet-lite0", language="smollm2-135m-instruct")
    capital = Item(id="capital", question="What is the capital of France?")
    assert "Paris" in mllm.generate([capital], max_new_tokens=8)[0]
    picture = Item(id="cat", question="What is in the picture?", answer="cat", image=data.cat())
    mixed = mllm.generate([picture, capital], max_new_tokens=8)
    assert "Paris" in mixed[1]
    batch = mllm.collate([picture], with_answers=True)
    assert batch.image_rows == (25,) and batch.input_ids.shape[1] <= 60
    mllm.add_experts(2, rank=2, alpha=4)
    assert len(mllm.expert_layers) == 7 * 30
    assert mllm.generate([picture, capital], [0, -1], max_new_tokens=8)[1] == mixed[1]
    assert bool(mllm.loss(batch).isfinite())


@pytest.mark.network
def test_the_first_layers_of_smollm2():
    pytest.importorskip("gguf")
    from mllmcl.models import smollm2

    model, tokenizer = smollm2.load(num_layers=3)
    assert len(model.model.layers) == 3 and tokenizer.eos_token == "<|im_end|>"
    with pytest.raises(ValueError, match=r"num_layers: expected 1\.\.30, got 31"):
        smollm2.load(num_layers=31)
