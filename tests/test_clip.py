"""The tokenizer: its formats, its padding, and tokens that a user added."""
import json
import shutil

import pytest
import torch
from references import write_tokenizer
from safetensors.torch import load_file, save_file

from clip import BEGIN, END, Tokenizer
from inputs.checkpoints import load_clip, load_tokenizer
from inputs.options import BASE
from weights import UserError

VOCAB = {token: i for i, token in enumerate(
    ["r", "e", "d", "a", "p", "l", "d</w>", "e</w>", "a</w>", "s</w>", "'", "s", "re", "red</w>",
     "1</w>", "2</w>", BEGIN, END, "!"])}
MERGES = [("r", "e"), ("re", "d</w>")]


def test_words_are_merged_in_order_and_framed_by_begin_and_end():
    tokenizer = Tokenizer(VOCAB, MERGES)
    ids = tokenizer(["Red  APPLE", ""])
    assert ids.shape == (2, 77) and ids.dtype == torch.int64
    expected = [VOCAB[t] for t in (BEGIN, "red</w>", "a", "p", "p", "l", "e</w>", END)]
    assert ids[0, :8].tolist() == expected
    assert set(ids[0, 8:].tolist()) == {VOCAB[END]}
    assert ids[1, 0] == VOCAB[BEGIN] and set(ids[1, 1:].tolist()) == {VOCAB[END]}
    tokens = ["red</w>", "'", "s</w>", "1</w>", "2</w>"]        # digits are single
    assert tokenizer.bpe.encode("red's 12").tokens == tokens


def test_a_long_prompt_is_truncated_with_a_warning_and_keeps_its_end():
    with pytest.warns(UserWarning, match="dropped: 'red red'"):
        ids = Tokenizer(VOCAB, MERGES)(["a " * 75 + "red red"])
    assert ids[0, -1] == VOCAB[END] and ids[0, -2] == VOCAB["a</w>"]


def test_padding_follows_the_tokenizers_own_files(tmp_path):
    write_tokenizer(tmp_path, VOCAB, MERGES)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(dict(pad_token={"content": "!"})))
    ids = load_tokenizer(tmp_path)(["red"])
    assert ids[0, :4].tolist() == [VOCAB[t] for t in (BEGIN, "red</w>", END, "!")]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(dict(pad_token="a")))
    assert load_tokenizer(tmp_path).pad == VOCAB["!"]       # SD 2 has it in special_tokens_map
    (tmp_path / "special_tokens_map.json").unlink()
    assert load_tokenizer(tmp_path).pad == VOCAB["a"]
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(UserError, match="merges.txt is missing"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("merges", [["r e", "re d</w>"], [["r", "e"], ["re", "d</w>"]]], ids=str)
def test_a_tokenizer_json_alone_is_the_same_tokenizer(tmp_path, merges):
    content = dict(model=dict(type="BPE", vocab=VOCAB, merges=merges), added_tokens=[
        dict(id=VOCAB[token], content=token, normalized=False, special=True)
        for token in (BEGIN, END)])
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(dict(pad_token="!")))
    prompts = ["Red  APPLE", "red's 12", ""]
    tokenizer = load_tokenizer(tmp_path)
    assert torch.equal(tokenizer(prompts), Tokenizer(VOCAB, MERGES, "!")(prompts))
    for wrong in ({}, dict(model={}), dict(model=dict(vocab=VOCAB, merges=3)),
                  content | dict(added_tokens=[3])):
        (tmp_path / "tokenizer.json").write_text(json.dumps(wrong))
        with pytest.raises(UserError, match=f"{tmp_path.name}.*(no CLIP tokenizer|is missing)"):
            load_tokenizer(tmp_path)


@pytest.mark.parametrize("merges", ["", "#version: 0.2\n", "#version: 0.2\nr e\n"], ids=repr)
def test_merges_that_are_cut_off_at_a_line_end_are_noticed(tmp_path, merges):
    write_tokenizer(tmp_path, VOCAB, MERGES)
    (tmp_path / "merges.txt").write_text(merges)
    with pytest.raises(UserError, match="merges of . tokens are missing, such as that of 'red</w>"):
        load_tokenizer(tmp_path)


def write_added(folder, kind, token, number):
    """Add a token to a tokenizer's folder in the manner of one of three programs."""
    entry = dict(content=token, normalized=True, special=False)
    files = {"added_tokens": {token: number},
             "tokenizer_config": dict(added_tokens_decoder={str(number): entry}),
             "tokenizer": dict(model=dict(vocab=VOCAB, merges=MERGES),
                               added_tokens=[entry | dict(id=number)])}
    (folder / f"{kind}.json").write_text(json.dumps(files[kind]))


@pytest.mark.parametrize("kind", ["added_tokens", "tokenizer_config", "tokenizer"])
def test_an_added_token_is_never_split(tmp_path, kind):
    if kind != "tokenizer":
        write_tokenizer(tmp_path, VOCAB, MERGES)
    write_added(tmp_path, kind, "<Toy>", len(VOCAB))
    ids = load_tokenizer(tmp_path)(["red <toy>a", "<TOY>"])
    assert ids[0, 1:4].tolist() == [VOCAB["red</w>"], len(VOCAB), VOCAB["a</w>"]]
    assert ids[1, 1:3].tolist() == [len(VOCAB), VOCAB[END]]


def test_an_added_token_needs_its_embedding(tmp_path):
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(BASE / part, tmp_path / part)
    number = len(json.loads((BASE / "tokenizer" / "vocab.json").read_text(encoding="utf-8")))
    write_added(tmp_path / "tokenizer", "added_tokens", "<toy>", number)
    with pytest.raises(UserError, match=f"token '<toy>' has id {number}, but .* has ids up to"):
        load_clip(tmp_path)
    file = tmp_path / "text_encoder" / "model.safetensors"
    tensors, name = load_file(file), "text_model.embeddings.token_embedding.weight"
    tensors[name] = torch.cat([tensors[name], torch.ones(1, tensors[name].shape[1])])
    save_file(tensors, file)
    tokenizer, text_model = load_clip(tmp_path)
    ids = tokenizer(["a <toy>"])
    assert ids[0, 2] == number and text_model(ids).isfinite().all()
    assert (text_model.embeddings["token_embedding"](ids)[0, 2] == 1).all()
