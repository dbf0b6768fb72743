"""lm-evaluation-harness on a packed folder, by its own command: `make test-lm-eval`."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import fp6_compile

ROOT = Path(__file__).parent.parent
TASK = ROOT / "tests/lm_eval_task"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs lm_eval: make test-lm-eval"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny packed Llama of random weights, and a tokenizer of bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("lm_eval") / "folder"
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab={**vocabulary, "<eos>": len(vocabulary)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>").save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=257)).bfloat16().eval()
    fp6_compile.quantize_(model)
    model.save_pretrained(folder)
    return folder


def _by_hand(folder, compiled=False):
    """Log-likelihoods of the task's choices, in order, by the model as transformers loads it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert isinstance(model.model.layers[0].mlp.up_proj.weight, fp6_compile.PackedTensor)
    found = []
    for line in (TASK / "words.jsonl").read_text().splitlines():
        doc = json.loads(line)
        for choice in doc["choices"]:
            before, after = (tokenizer(text)["input_ids"] for text in (doc["question"], choice))
            with torch.no_grad():
                logits = model(torch.tensor([(before + after)[:-1]])).logits[0, len(before) - 1 :].float()
            found.append(logits.log_softmax(-1).gather(1, torch.tensor(after)[:, None]).sum().item())
    return found


@pytest.mark.parametrize(
    ("arguments", "batch"), [(",softmax_dtype=float32", "1"), (",softmax_dtype=float32,dtype=bfloat16", "8")]
)
def test_the_command(arguments, batch, folder, tmp_path):
    command = [
        Path(sys.executable).with_name("lm_eval"),
        "--model",
        "hf",
        "--model_args",
        f"pretrained={folder}{arguments}",
    ]
    command += ["--tasks", "fp6_words", "--include_path", TASK, "--device", "cpu", "--batch_size", batch]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [*command, "--output_path", tmp_path, "--log_samples"], env=env, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (samples,) = tmp_path.rglob("samples_fp6_words*.jsonl")
    docs = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    found = [float(response[0]) for sample in docs for response in sample["filtered_resps"]]
    # batches are padded, and their sums rounded otherwise
    torch.testing.assert_close(found, _by_hand(folder), rtol=0, atol=1e-4 if batch == "1" else 0.1)


def test_a_compiled_model_in_python(folder, monkeypatch, tmp_path):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    model.forward = torch.compile(model.forward, backend="fp6", dynamic=True)
    lm = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(folder), device="cpu")
    docs = [json.loads(line) for line in (TASK / "words.jsonl").read_text().splitlines()]
    pairs = [(doc["question"], choice) for doc in docs for choice in doc["choices"]]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    found = [value for value, _ in lm.loglikelihood(requests, disable_tqdm=True)]
    torch.testing.assert_close(found, _by_hand(folder), rtol=0, atol=0.1)
