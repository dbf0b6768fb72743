"""Adapters on packed transformers models, Trainer, generate, compiled layers."""

import copy
import json

import pytest
import torch

import fp6_compile
from fp6_compile import Fp6Config, PackedTensor
from tests.support.hf import TOKENS, llama, logits, packed, transformers
from tests.support.references import close

peft = pytest.importorskip("peft", reason="peft is for development")
# PEFT 0.21 asks transformers 5.24 by an old name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("packed")
    llama().save_pretrained(folder / "source")
    model = transformers.LlamaForCausalLM.from_pretrained(
        folder / "source", quantization_config=Fp6Config(group_size=64)
    )
    model.save_pretrained(folder)
    return folder


def _load(folder, **fields):
    config = {"quantization_config": Fp6Config(**fields)} if fields else {}
    return transformers.LlamaForCausalLM.from_pretrained(folder, **config)


def _adapted(model):
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False))


def _gradients(model, call):
    model.zero_grad()
    call(input_ids=TOKENS, labels=TOKENS).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("backend", [None, pytest.param("inductor", marks=pytest.mark.slow), "fp6"])
def test_gradients_of_adapters_are_those_on_the_dequantized_model(backend, folder, captured):
    model, reference = _adapted(_load(folder)), _adapted(_load(folder, dequantize=True))
    expected = _gradients(reference, reference)
    call = model if backend is None else torch.compile(model, backend=backend)
    gradients = _gradients(model, call)
    assert gradients.keys() == expected.keys()
    assert len(gradients) == 2 * len(TARGETS)
    for name, gradient in gradients.items():
        error = (gradient - expected[name]).norm() / expected[name].norm()
        assert error < 0.03, (name, error)  # bfloat16


def test_trainer_takes_a_packed_model_with_adapters(folder, tmp_path):
    pytest.importorskip("accelerate")
    arguments = transformers.TrainingArguments(tmp_path, max_steps=1, use_cpu=True, report_to=[], save_steps=1)
    data = [{"input_ids": TOKENS[0], "labels": TOKENS[0]}]
    base = _load(folder)
    with pytest.raises(ValueError, match="attach trainable adapters"):
        transformers.Trainer(base, arguments, train_dataset=data)
    model = _adapted(base)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    transformers.Trainer(model, arguments, train_dataset=data).train()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name in before if "lora" in name}
    again = peft.PeftModel.from_pretrained(_load(folder), tmp_path / "checkpoint-1")
    assert torch.equal(logits(again), logits(model))


def test_merging_is_an_error_that_says_the_way_out(folder, tmp_path):
    model = _adapted(_load(folder))
    before = logits(model)
    for merge in (model.merge_adapter, model.merge_and_unload, lambda: model.merge_adapter(safe_merge=True)):
        with pytest.raises(NotImplementedError, match=r"model.dequantize\(\)\), merge, and call quantize_ again"):
            merge()
    assert torch.equal(logits(model), before)
    model.get_base_model().dequantize()
    assert not packed(model)
    assert all("lora" in name for name, p in model.named_parameters() if p.requires_grad)
    merged = model.merge_and_unload()
    fp6_compile.quantize_(merged, skip=["lm_head"])
    merged.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_method"] == "fp6"
    assert torch.equal(logits(_load(tmp_path)), logits(merged))


def test_generate(folder):
    """With a growing cache and a static one, which `generate` does not compile on a CPU."""
    model, reference = _load(folder), _load(folder, dequantize=True)
    how = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    tokens = reference.generate(TOKENS, **how)
    assert torch.equal(model.generate(TOKENS, **how), tokens)
    assert torch.equal(model.generate(TOKENS, cache_implementation="static", **how), tokens)
    assert model.hf_quantizer.is_compileable


def test_compiled(folder, captured):
    model = _load(folder)
    with torch.no_grad():
        out = torch.compile(model, backend="fp6")(TOKENS).logits
    report = fp6_compile.last_report()
    assert [line.note for line in report.linears if line.quantized].count(None) == 1  # the head: packed by the backend
    reference = copy.deepcopy(model).dequantize()
    head = PackedTensor.quantize(model.lm_head.weight)
    reference.lm_head.weight = torch.nn.Parameter(head.dequantize())
    close(out, logits(reference), 16)


def test_safetensors_writers_say_the_way_out(folder, tmp_path):
    from safetensors.torch import save_file, save_model

    model = _load(folder)
    for write in (
        lambda: save_file(model.state_dict(), tmp_path / "x"),
        lambda: save_model(model, str(tmp_path / "x")),
    ):
        with pytest.raises(TypeError, match=r"model.save_pretrained\(folder\) .* fp6_compile.save\(model, folder\)"):
            write()
    assert not (tmp_path / "x").exists()
