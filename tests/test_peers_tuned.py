"""What a fine-tuning run leaves, as transformers and PEFT read it: exported adapter, merged and quantized folders."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="make test-peers installs PyTorch")
transformers = pytest.importorskip("transformers", reason="make test-peers installs transformers")
peft = pytest.importorskip("peft", reason="make test-peers installs PEFT")

import tuned  # noqa: E402

from entrenar.cli import main  # noqa: E402
from entrenar.cli.conversation import Conversation, Manner  # noqa: E402
from entrenar.cli.models import open_model  # noqa: E402
from entrenar.data.chat import load_template  # noqa: E402
from entrenar.llama.generate import Sampling  # noqa: E402

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]

IDS = np.random.default_rng(0).integers(0, 256, (2, 40))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """base and run, a fine-tuning run of it"""
    place = tmp_path_factory.mktemp("made")
    tuned.base(place / "base", template=tuned.CHATML)
    tuned.run(place / "run", place / "base")
    return place


def theirs(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(torch.tensor(ids)).logits.float().numpy()


def close(ours, wanted):
    np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


def test_peft_loads_an_exported_adapter_and_says_the_same(made, tmp_path):
    assert main(["export", str(made / "run"), "--to", "peft", "--out", str(tmp_path / "adapter")]) == 0
    model = peft.PeftModel.from_pretrained(theirs(made / "base"), tmp_path / "adapter")
    close(open_model(made / "run").model(IDS).data, logits(model))


def test_the_model_card_is_one_that_the_hub_reads(made, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    words = ["--out", str(tmp_path / "adapter"), "--base-name", "meta-llama/Llama-3.2-1B"]
    assert main(["export", str(made / "run"), "--to", "peft", *words]) == 0
    card = hub.ModelCard.load(tmp_path / "adapter" / "README.md")
    assert (card.data.base_model, card.data.library_name) == ("meta-llama/Llama-3.2-1B", "peft")
    assert "lora" in card.data.tags and "A LoRA adapter of rank 4" in card.text


def test_transformers_loads_a_merged_model_and_says_the_same(made, tmp_path):
    assert main(["merge", str(made / "run"), "--out", str(tmp_path / "merged")]) == 0
    close(open_model(made / "run").model(IDS).data, logits(theirs(tmp_path / "merged")))


def test_transformers_loads_a_bfloat16_folder_and_says_the_same(made, tmp_path):
    assert main(["quantize", str(made / "base"), "--to", "bfloat16", "--out", str(tmp_path / "half")]) == 0
    model = theirs(tmp_path / "half")
    close(open_model(tmp_path / "half").model(IDS).data, logits(model))


def test_transformers_goes_on_from_a_conversation_with_the_same_answer(made):
    """Greedy, over three turns: what is kept of what was read must change nothing."""
    opened = open_model(made / "base")
    talk = Conversation(opened, load_template(opened.tokenizer), Manner(Sampling(temperature=0), 10))
    model, tokenizer = theirs(made / "base"), transformers.AutoTokenizer.from_pretrained(made / "base")
    for prompt in ("hello", "and then?", "so"):
        answer = talk.ask(prompt)
        "".join(answer)
        ids = answer.writing.ids
        text = tokenizer.apply_chat_template(answer.messages, add_generation_prompt=True, tokenize=False)
        assert tokenizer(text, add_special_tokens=False).input_ids == ids
        wanted = model.generate(torch.tensor([ids]), max_new_tokens=10, do_sample=False)[0, len(ids) :].tolist()
        said = talk.readers[None].ids[len(ids) :]  # all of the answer but its last token, which nothing follows yet
        assert len(said) >= 1 and said == wanted[: len(said)] and len(wanted) - len(said) <= 1
        talk.keep(answer)
