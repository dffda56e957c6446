"""`MLLM`: one object for a multimodal LLM of any family, its experts, its batches, its loss and its answers."""

# B samples, S positions, n answer tokens, V vocabulary, E experts, P feature tokens of an image

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mllmcl_kernels import Mask

from ..options import check_model_name
from . import families
from .batch import Batch, Encoded, answer_places, pad_rows, prompt_mask
from .description import described
from .expert_setup import experts_added, experts_grown, fill, masks_of, parameters_that_may_train
from .experts import ExpertLinear, ExpertProjectorLinear, ExpertState, select, with_batch
from .families.base import first_module
from .features import FeatureCache, image_key
from .generation import answers
from .perplexity import perplexity
from .prefixes import Prefixes
from .prompts import SoftPrompts, prompting
from .sharing import join, part
from .steering import Steering

__all__ = ["MLLM"]

#: head options that would change logits after the head; models with them are refused rather than scored wrongly
LOGIT_OPTIONS = ("final_logit_softcapping", "logits_scaling", "logit_scale")


class MLLM:
    """A multimodal LLM with a frozen base.

    Made by `from_pretrained` or `compose`. Attributes: `model` (the module), `processor`, `tokenizer`, `device`,
    `dtype`, `family`, `experts` (an `ExpertState`, None before `add_experts`), `expert_layers` (full name to
    `ExpertLinear`), `projector_layers`, `router` (a callable `samples -> gates` as in `use_experts`, or None),
    `routes_batches` (the router's answer is one for a whole batch, so `generate` asks it batch by batch), `prompts` (a
    bank of soft prompts or prefixes, or None), `prompt_router` (a callable `samples -> int64 ids [B, k]`, or
    None), `attached` (modules of a method by name), `steering` (a `Steering` of its language tower, or None).
    """

    def __init__(self, model: nn.Module, processor, tokenizer):
        self.model = model.requires_grad_(False)
        self.processor = processor
        self.tokenizer = tokenizer
        self.family = families.find(model.config.model_type)
        self.experts: ExpertState | None = None
        self.expert_layers: dict[str, ExpertLinear] = {}
        self.projector_layers: dict[str, ExpertProjectorLinear] = {}
        self.router: Callable[[Sequence], Tensor] | None = None
        self.routes_batches = False
        self.prompts: SoftPrompts | None = None
        self.prompt_router: Callable[[Sequence], Tensor] | None = None
        self.attached: dict[str, nn.Module] = {}
        self.steering: Steering | None = None
        #: what it was made from, for records
        self.origin: dict[str, object] = {}
        self.shares_inputs = False
        self.features = FeatureCache()
        self._vision_identity: str | None = None
        self._prompt_parts: tuple[str, str] | None = None
        self._anchor: tuple[str, list[int]] | None = None
        self._refuse_unknown_heads()
        path = first_module(model, self.family.language)
        if path is None:
            raise ValueError(
                f"the family {self.family.name!r} finds no language tower in {type(model).__name__} "
                f"(looked for {', '.join(self.family.language)})"
            )
        self.language_path = path
        self.vision_path = first_module(model, self.family.vision)
        self.projector_path = first_module(model, self.family.projector)
        #: the model without its head
        self.trunk = model if not hasattr(model, "base_model") else model.base_model
        self.head = model.get_output_embeddings()

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | os.PathLike,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> MLLM:
        """Any image-text-to-text model of transformers, with its processor.

        Raises:
            ValueError: a path without a folder there. OSError: the model hub has no such name, or cannot be reached.
        """
        check_model_name("name_or_folder", name_or_folder)
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"dtype must be a torch.dtype, got {dtype!r}")
        from transformers import AutoModelForImageTextToText

        model = AutoModelForImageTextToText.from_pretrained(name_or_folder, dtype=dtype).eval().to(device)
        processor = families.find(model.config.model_type).processor(name_or_folder)
        mllm = cls(model, processor, processor.tokenizer)
        mllm.origin = {"pretrained": os.fspath(name_or_folder)}
        return mllm

    @classmethod
    def compose(
        cls,
        *,
        vision: str | nn.Module,
        language: str | nn.Module,
        projector: str = "mlp2x_gelu",
        tokenizer=None,
        num_layers: int | None = None,
        image_size: int | None = None,
        select_layer: int = -2,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> MLLM:
        """The LLaVA recipe from two backbones; the projector starts from torch's generator.

        Args:
            vision: "efficientnet-lite0", a name or folder of transformers, or an encoder module.
            language: "smollm2-135m-instruct", a name or folder of transformers, or a causal LM with `tokenizer`.
            num_layers: keep only the first layers of SmolLM2, for quick tests.
            image_size: of EfficientNet-Lite0, a multiple of 32.
            select_layer: hidden layer of a transformers vision model.
        """
        from .composed import ComposedModel, load_language
        from .vision import load_vision

        language_model, tokenizer = load_language(language, tokenizer, num_layers, dtype)
        model = ComposedModel(load_vision(vision, select_layer, image_size), language_model, projector)
        mllm = cls(model.to(device=device, dtype=dtype).eval(), tokenizer, tokenizer)
        named = {"vision": vision, "language": language}
        mllm.origin = {key: value if isinstance(value, str) else type(value).__name__ for key, value in named.items()}
        mllm.origin.update(projector=projector, num_layers=num_layers, image_size=image_size, select_layer=select_layer)
        return mllm

    # -- what it is

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.head.weight.dtype

    @property
    def prompt_parts(self) -> tuple[str, str]:
        """What a composed model's prompt has before and after image and question."""
        if self._prompt_parts is None:
            from .families.composed import template_parts

            self._prompt_parts = template_parts(self.tokenizer)
        return self._prompt_parts

    def train(self, mode: bool = True) -> MLLM:
        """Training mode: dropout on, checkpointing on where enabled. The vision tower stays in evaluation mode."""
        self.model.train(mode)
        if self.vision_path is not None:
            self.model.get_submodule(self.vision_path).eval()
        return self

    def eval(self) -> MLLM:
        return self.train(False)

    def __repr__(self) -> str:
        return f"MLLM({self.describe().partition(chr(10))[0]})"

    def describe(self) -> str:
        """Trainable parameters, the layers with experts and the experts, as text."""
        return described(self)

    def _refuse_unknown_heads(self) -> None:
        config = getattr(self.model.config, "text_config", self.model.config)
        for name in LOGIT_OPTIONS:
            if getattr(config, name, None) not in (None, 1, 1.0):
                raise ValueError(f"{type(self.model).__name__} changes its logits by {name}, which is not supported")

    # -- experts

    def add_experts(
        self,
        num_experts: int,
        rank: int | Sequence[int],
        alpha: float | Sequence[float],
        targets: str | Sequence[str] | None = "all-linear",
        dropout: float = 0.05,
        router: str | None = None,
        router_top_k: int | None = None,
        projector_experts: bool = False,
    ) -> MLLM:
        """Put a stack of LoRA experts beside linears of the language tower.

        Args:
            num_experts: how many; all start trainable.
            rank, alpha: one value, or one for each expert. scaling = alpha / rank.
            targets: "all-linear" for the seven kinds of a decoder layer, or see `targets.match_targets`. None: no LoRA,
                an expert is a copy of the projector, and rank and alpha say nothing.
            dropout: on the input of the LoRA path, in training mode.
            router: None, or "softmax", "sigmoid" or "cosine" for a learned in-layer router.
            router_top_k: experts kept for each token; None keeps all.
            projector_experts: each expert also owns a copy of the projector's linears.

        Raises:
            ValueError: experts are there already, a target matches nothing, or a number is out of range.
        """
        experts_added(
            self,
            num_experts,
            rank,
            alpha,
            targets=targets,
            dropout=dropout,
            router=router,
            router_top_k=router_top_k,
            projector_experts=projector_experts,
        )
        return self

    def grow_experts(
        self, num: int, rank: int | Sequence[int] | None = None, alpha: float | Sequence[float] | None = None
    ) -> MLLM:
        """Append `num` experts, trainable; the old ones stay bit for bit.

        Parameters are replaced by larger ones, so an optimizer has to be made anew. `rank` and `alpha` default to those
        of the last expert.
        """
        experts_grown(self, num, rank, alpha)
        return self

    def lay_experts(self, *, by_columns: bool) -> MLLM:
        """Lay every B in memory column by column, so that each expert is one piece, or row by row, also as it grows.

        Same values, same parameters; views of them taken before are of no use. On the CPU a step is a little faster by
        columns, and `mllmcl.train` lays them so while it runs. FSDP2 and whatever else takes contiguous parameters
        alone want rows, as `add_experts` makes them.

        Raises:
            ValueError: there are no experts.
        """
        if self.experts is None:
            raise ValueError("there are no experts to lay, call add_experts first")
        self.experts.by_columns = by_columns
        for layer in self.expert_layers.values():
            layer.lay()
        return self

    def share_inputs(self, on: bool = True) -> MLLM:
        """Let q, k and v, and gate and up, make one pass over their common input, with the experts to come as well.

        Same formula, other roundings; with dropout one mask for all of them. For steps that memory limits: the input
        is read once for all experts and routers, and its gradient written once. A compiled model does not share.
        """
        self.shares_inputs = on
        (join if on else part)(self.expert_layers)
        return self

    def merge_experts(self) -> MLLM:
        """Add the experts, each with weight 1, to the base weights of their linears and start them anew: B is 0.

        From then on those base weights belong to what was learned: save `merged_weights` and give them to
        `load_merged_weights`. Projector copies stay as they are.

        Raises:
            ValueError: there are no experts, or a learned router weighs them differently for each token.
        """
        if self.experts is None:
            raise ValueError("there are no experts to merge, call add_experts first")
        if self.experts.router is not None:
            raise ValueError("experts that a learned router mixes token by token cannot be merged into one weight")
        for layer in self.expert_layers.values():
            layer.merge()
        self.experts.num_merged += 1
        return self

    def merged_weights(self) -> dict[str, Tensor]:
        """Name to data of the base weights that experts were merged into; empty before the first merge. Not copied."""
        if self.experts is None or not self.experts.num_merged:
            return {}
        return {f"{path}.weight": layer.weight.detach() for path, layer in self.expert_layers.items()}

    def load_merged_weights(self, weights: dict[str, Tensor], num_merged: int) -> None:
        """Copy what `merged_weights` gave, after `num_merged` merges, into the base weights."""
        if num_merged:
            with torch.no_grad():
                for path, layer in self.expert_layers.items():
                    layer.weight.copy_(weights[f"{path}.weight"])
        self.experts.num_merged = num_merged

    def set_trainable(
        self, experts: Sequence[bool] | None = None, *, projector: bool = False, router: bool = False
    ) -> MLLM:
        """Say what trains: `requires_grad` of the parameters, and which experts of a stack get a gradient.

        Args:
            experts: one boolean for each expert; None leaves them as they are.
            projector: the experts' copies where there are any, else the projector itself.
            router: the in-layer routers and gatings.
        """
        state = self.experts
        if experts is not None:
            if state is None:
                raise ValueError("experts: there are none, call add_experts first")
            if len(experts) != state.num_experts:
                raise ValueError(f"experts: expected {state.num_experts} booleans, got {len(experts)}")
            state.trainable = tuple(bool(value) for value in experts)
        if router and not any(layer.router_parameters for layer in self.expert_layers.values()):
            raise ValueError("router: there is no learned router, give add_experts one or the layers a gating")
        if projector and self.projector_path is None:
            raise ValueError(f"projector: {type(self.model).__name__} has none that its family knows")
        some = state is not None and any(state.trainable)
        for layer in self.expert_layers.values():
            layer.lora_a.requires_grad_(some)
            layer.lora_b.requires_grad_(some)
            for parameter in layer.router_parameters.values():
                parameter.requires_grad_(router)
        if self.projector_layers:
            for layer in self.projector_layers.values():
                layer.expert_weight.requires_grad_(projector and some)
                if layer.expert_bias is not None:
                    layer.expert_bias.requires_grad_(projector and some)
        elif self.projector_path is not None:
            self.model.get_submodule(self.projector_path).requires_grad_(projector)
        return self

    @contextlib.contextmanager
    def use_experts(self, gates) -> Iterator[MLLM]:
        """Within the context these experts act.

        Args:
            gates: None (the resident expert if there is one, else the learned router, else every expert weighs 1),
                "off" (the base alone), a float tensor `[E]`, `[B, E]` or `[B, G, E]` (a row for each group of layers,
                see `ExpertState.groups`), or int64 ids `[B]` (-1 = the base alone; one batch may mix).
        """
        if self.experts is None:
            if gates is not None and not (isinstance(gates, str) and gates == "off"):
                raise ValueError("gates: there are no experts, call add_experts first")
            yield self
            return
        with self.experts.using(select(self.experts, gates, self.device)):
            yield self

    def base_model_only(self) -> contextlib.AbstractContextManager:
        """`use_experts("off")`."""
        return self.use_experts("off")

    def parameter_masks(self) -> dict[str, Mask]:
        """Name to `mllmcl_kernels.Mask` of every stack of experts, for `MaskedAdamW`: True at trainable experts."""
        return masks_of(self)

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Name to parameter of what trains now."""
        return {name: value for name, value in self.model.named_parameters() if value.requires_grad}

    def trainable_state(self) -> dict[str, Tensor]:
        """Name to data of all that may train: experts, routers, projector, attached modules. Clone to keep."""
        return {name: value.detach() for name, value in parameters_that_may_train(self).items()}

    def load_trainable_state(self, state: dict[str, Tensor]) -> None:
        """Copy `state` into the parameters.

        Raises:
            ValueError: names missing, names left over, or shapes that differ, with the first of them.
        """
        fill(parameters_that_may_train(self), state)

    # -- what is no expert

    def attach(self, name: str, module: nn.Module) -> nn.Module:
        """Make a method's own module part of the model, where its parameters train, are saved and are restored.

        Returns:
            The module, on the model's device.

        Raises:
            ValueError: the model has something of that name.
        """
        if hasattr(self.model, name):
            raise ValueError(f"name: {type(self.model).__name__} has {name!r} already")
        setattr(self.model, name, module.to(self.device))
        self.attached[name] = module
        return module

    def add_prompts(self, num_prompts: int, length: int) -> MLLM:
        """A bank of soft prompts, each of `length` trained tokens; `use_prompts` puts them in."""
        table = self.model.get_input_embeddings().weight
        self.prompts = self.attach("soft_prompts", SoftPrompts(num_prompts, length, table))
        return self

    def add_prefixes(
        self,
        num_prefixes: int,
        length: int,
        layers: Sequence[int],
        shared_length: int = 1,
        shared_layers: Sequence[int] = (),
    ) -> MLLM:
        """A bank of prefixes, trained keys and values for some decoder layers; `use_prompts` puts them in.

        Args:
            num_prefixes, length, layers: prefixes of the bank, their length, the numbers of the layers that have them.
            shared_length, shared_layers: of one more prefix that all samples have.
        """
        tower = self.model.get_submodule(self.language_path)
        bank = Prefixes(tower, num_prefixes, length, layers, shared_length, shared_layers)
        self.prompts = self.attach("prefixes", bank)
        return self

    @contextlib.contextmanager
    def use_prompts(self, ids) -> Iterator[MLLM]:
        """Within the context each sample has these soft prompts behind its start token, or these prefixes.

        Args:
            ids: int64 `[B, k]`, the last of a row nearest to the text, or `[B]`; -1 = none, and one batch may mix.
                None: no sample has any.
        """
        if self.prompts is None:
            if ids is not None:
                raise ValueError("prompts: there are none, call add_prompts or add_prefixes first")
            yield self
            return
        with self.prompts.using(ids):
            yield self

    def enable_checkpointing(self) -> MLLM:
        """Recompute decoder layers in the backward pass, with the experts of the forward pass."""
        options = {"use_reentrant": False, "context_fn": self._recompute_contexts}
        # the name that transformers keeps from version 6 on, where it is known
        language = getattr(self.model, "language", self.model)
        if hasattr(language, "activation_checkpointing_enable"):
            language.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
        else:
            language.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        return self

    def _recompute_contexts(self):
        # asked for in the forward pass; the backward pass may run after use_experts and use_prompts have ended
        contexts = [] if self.experts is None else [self.experts.recompute_contexts()[1]]
        if self.prompts is not None:
            contexts.append(self.prompts.using(self.prompts.ids))
        return contextlib.nullcontext(), _entering_all(contexts)

    # -- batches

    def collate(self, samples: Sequence, *, with_answers: bool) -> Batch:
        """Samples to tensors: right padded with labels for training, left padded prompts for generation."""
        if not samples:
            raise ValueError("samples: expected at least one")
        encoded = self.family.encode(self, samples)
        return self.padded(samples, encoded, self._answers(encoded, samples) if with_answers else None)

    def _answers(self, encoded: Encoded, samples: Sequence) -> list[list[int]]:
        """Token ids of each answer and the end token, as they are after the last character of the prompt."""
        if self._anchor is None:
            last = self.family.prompt(self, "?", False)[-1]
            self._anchor = last, self.tokenizer(last, add_special_tokens=False)["input_ids"]
        last, anchor = self._anchor
        # a prompt that ends in a word is followed by a space, which belongs to the answer's first token
        space = "" if last.isspace() else " "
        texts = [f"{last}{space}{sample.answer}" for sample in samples]
        rows = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        answers = []
        for sample, row in zip(samples, rows, strict=True):
            if row[: len(anchor)] != anchor:
                raise ValueError(
                    f"samples: the answer {sample.answer!r} of {sample.id!r} melts into the prompt's end {last!r}"
                )
            answers.append([*row[len(anchor) :], self.tokenizer.eos_token_id])
        return answers

    def padded(self, samples: Sequence, encoded: Encoded, answers: list[list[int]] | None) -> Batch:
        """A batch of encoded prompts, and of answers' tokens where there are some: those are padded on the right."""
        left = answers is None
        tails = answers or [[] for _ in samples]
        rows = [[*prompt, *tail] for prompt, tail in zip(encoded.ids, tails, strict=True)]
        input_ids = pad_rows(rows, self.pad_id, left)
        attention_mask = pad_rows([[1] * len(row) for row in rows], 0, left)
        extras = {
            name: pad_rows([[*row, *[0] * len(tail)] for row, tail in zip(values, tails, strict=True)], 0, left)
            for name, values in encoded.token_extras.items()
        }
        inputs = {**encoded.images, **extras}
        positions = self.family.positions(self, {"input_ids": input_ids, **inputs}, attention_mask)
        image_token = getattr(self.model.config, "image_token_id", None)
        counts = [row.count(image_token) for row in encoded.ids]
        features = None
        if self.experts is not None and self.experts.sample_features is not None:
            features = self.experts.sample_features(samples)
        batch = Batch(
            sample_ids=tuple(sample.id for sample in samples),
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=positions,
            inputs=inputs,
            features=features,
            token_inputs=tuple(extras),
            image_index=tuple(index for index, count in enumerate(counts) if count),
            image_rows=tuple(count for count in counts if count),
            **({} if left else answer_places(encoded.ids, answers, input_ids.shape[1])),
        )
        return batch.to(self.device)

    @property
    def pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if pad is None else pad

    def image_features(self, samples: Sequence) -> Tensor:
        """Frozen vision features before the projector, `[n, P, d]` on the model's device; each image is encoded once.

        Where images have unequal token counts (packed models), P is 1: the mean over an image's tokens.
        """
        lacks = [sample.id for sample in samples if sample.image is None]
        if lacks:
            raise ValueError(f"samples: every sample needs an image, {lacks[0]!r} has none")
        if self._vision_identity is None:
            self._vision_identity = self._identity()
        size = getattr(getattr(self.model, "vision", None), "image_size", None)
        keys = [image_key(self._vision_identity, size, sample) for sample in samples]
        found = self.features.get(keys, lambda at: self.family.vision_features(self, [samples[i] for i in at]))
        if len({value.shape for value in found}) > 1:
            found = [value.mean(0, keepdim=True) for value in found]
        # stacking copies, so what was encoded in inference mode may enter autograd here
        return torch.stack(found).to(self.device)

    def _identity(self) -> str:
        # weights are read only where a name has to hold between runs
        if self.features.folder is None:
            return "this model"
        from .vision import weights_identity

        path = self.vision_path
        return f"{weights_identity(self.model.get_submodule(path) if path else self.model)} {self.dtype}"

    def cache_images(self, folder: str | os.PathLike | None) -> MLLM:
        """Keep image features in `folder` between runs; None keeps them in memory only."""
        self.features = FeatureCache(folder)
        self._vision_identity = None
        return self

    # -- forward

    def hidden_states(self, batch: Batch) -> Tensor:
        """Output of the language tower before its head, `[B, S, D]`."""
        with prompting(self, batch) as (batch, original), self.in_batch(batch):
            output = self.run_trunk(batch.input_ids, batch.attention_mask, batch.position_ids, batch.inputs)
            return original(output.last_hidden_state)

    def answer_hidden(self, batch: Batch) -> Tensor:
        """Hidden states `[n, D]` that predict the answer tokens, for losses that hold the head themselves."""
        return self.at_answers(self.hidden_states(batch), batch)

    @staticmethod
    def at_answers(hidden_BSD: Tensor, batch: Batch) -> Tensor:
        """The rows `[n, D]` of hidden states `[B, S, D]` that predict the answer tokens."""
        if batch.answer_positions is None:
            raise ValueError("batch: it has no answers, collate with with_answers=True")
        return hidden_BSD.flatten(0, 1).index_select(0, batch.answer_positions)

    def answer_logits(self, batch: Batch) -> Tensor:
        """Logits `[n, V]` that predict `batch.answer_labels`; no other position goes through the head."""
        return self.head(self.answer_hidden(batch))

    @property
    def head_weight(self) -> Tensor:
        """The head as a matrix `[V, D]`; ValueError if it adds a bias, which losses that hold it would miss."""
        if getattr(self.head, "bias", None) is not None:
            raise ValueError(f"the head of {type(self.model).__name__} has a bias, which this loss does not support")
        return self.head.weight

    def loss(self, batch: Batch) -> Tensor:
        """Mean cross entropy over answer and end tokens, a scalar in float32 or better."""
        return self.cross_entropy(self.answer_hidden(batch), batch)

    def cross_entropy(self, hidden_nD: Tensor, batch: Batch, reduction: str = "mean") -> Tensor:
        """Cross entropy of the answer tokens from what `answer_hidden` gave; reduced as torch's."""
        logits = self.head(hidden_nD)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, batch.answer_labels, reduction=reduction)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[MLLM]:
        """Evaluation mode within the context."""
        was_training = self.model.training
        self.eval()
        try:
            yield self
        finally:
            self.train(was_training)

    def perplexity(self, text: str, *, window: int = 256, batch_size: int = 8) -> float:
        """Perplexity of plain text; see `perplexity.perplexity`."""
        return perplexity(self, text, window, batch_size)

    @contextlib.contextmanager
    def in_batch(self, batch: Batch, memory: dict[str, Tensor] | None = None) -> Iterator[None]:
        """What forward passes over a batch have to know of it."""
        state = self.experts
        with contextlib.ExitStack() as stack:
            if self.steering is not None:
                stack.enter_context(self.steering.on(batch))
            if state is not None:
                token_mask = batch.attention_mask.bool() if state.collect else None
                facts = {"prompt_mask": prompt_mask(batch), "features": batch.features, "memory": memory}
                selection = with_batch(state.selection, token_mask, batch.image_index, batch.image_rows, **facts)
                stack.enter_context(state.using(selection))
            yield

    def run_trunk(self, input_ids, attention_mask, position_ids, inputs, past_key_values=None, use_cache=False):
        return self.trunk(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **inputs,
        )

    # -- answers

    def generate(
        self, samples: Sequence, experts="route", *, prompts="route", max_new_tokens: int = 16, batch_size: int = 32
    ) -> list[str]:
        """Greedy answers, batched; one batch may mix experts and soft prompts.

        Args:
            experts: "route" (`self.router` where it is set, else the in-layer router or every expert), "current" (what
                an enclosing `use_experts` says), or gates as in `use_experts`; ids and `[n, E]` floats are one row a
                sample.
            prompts: "route" (`self.prompt_router`, asked for each batch that is decoded; none without it), or ids as in
                `use_prompts`, one row a sample.
            max_new_tokens: at most so many tokens for each answer, the end token included.
            batch_size: samples decoded together; prompts of like length share a batch.

        Returns:
            Stripped text without special tokens, in the order of `samples`.
        """
        return answers(self, samples, experts, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size)

    @property
    def end_ids(self) -> Tensor:
        """Tokens that end an answer: the tokenizer's and those of the model's generation config."""
        owner = getattr(self.model, "language", self.model)
        configured = getattr(getattr(owner, "generation_config", None), "eos_token_id", None)
        ids = {self.tokenizer.eos_token_id}
        ids.update(configured if isinstance(configured, (list, tuple)) else [configured])
        return torch.tensor(sorted(ids - {None}), device=self.device)


@contextlib.contextmanager
def _entering_all(contexts: Sequence[contextlib.AbstractContextManager]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield
