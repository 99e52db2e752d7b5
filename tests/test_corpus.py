"""The lesson: a text is bytes with a checksum, records joined one way, and tokens of one tokenizer."""
import pytest
import torch

from data.checkpoint import load_checkpoint
from data.corpus import (calibration_windows, consecutive_windows, embedded_text, find_file, join_lines,
                         join_rows, load_text, random_windows)
from data.tokenizer import load_tokenizer
from grasp import find_redundant
from runtime.cli import TINY


# ------------------------------------------------------------------------------------------------------- text

def test_wikitext_rows_keep_their_newline_and_blank_ones_are_empty():
    assert join_rows(" \n = A = \n \n b c \n") == "\n\n = A = \n\n\n\n\n b c \n"


def test_ptb_lines_are_stripped():
    assert join_lines(" a b \n c \n") == "a b\n\nc" and join_lines(" a b \n c \n", " ") == "a b c"


@pytest.mark.parametrize("name, tokens", [("wikitext2", 341_469), ("ptb", 101_549), ("ptb-test", 114_438),
                                          ("ptb-new", 106_527)])
def test_token_counts_with_the_llama_tokenizer(name, tokens, data_dir):
    """341,469 is the count that papers' 166 windows of 2048 come from, 106,527 that of their PTB."""
    tokenizer = load_tokenizer(data_dir / "llama2-tokenizer")
    text, protocol = load_text(name, "test", data_dir)
    stream = tokenizer.stream(text)
    assert len(stream) == tokens and stream[0] == 1 and (stream == 1).sum() == 1
    assert ("WikiText-2 raw, test split" if name == "wikitext2" else "Penn Treebank") in protocol


def test_the_training_text_or_its_head_is_named(data_dir):
    text, protocol = load_text("wikitext2", "train", data_dir)
    assert ("only its head" in protocol) == (len(text) < 10_000_000) and "training split" in protocol


def test_embedded_text_is_held_out_paragraph_by_paragraph():
    train, test = (set(embedded_text(split).split("\n\n")) for split in ("train", "test"))
    assert len(train) > 1000 and len(test) > 100 and not train & test


def test_a_text_can_be_a_file(tmp_path):
    (tmp_path / "a.txt").write_text("été\n")
    assert load_text(str(tmp_path / "a.txt"), "test") == ("été\n", "the file as it stands")
    (tmp_path / "b.txt").write_bytes(b"abc\xff")
    with pytest.raises(ValueError, match="b.txt: not UTF-8 text.* 3"):
        load_text(str(tmp_path / "b.txt"), "test")
    with pytest.raises(FileNotFoundError, match="no text 'wikitext3': expected wikitext2, ptb"):
        load_text("wikitext3", "test")


def test_a_file_is_text_and_no_json(tmp_path):
    """A byte order mark is not text. JSON is refused, because its syntax would be evaluated."""
    (tmp_path / "text.txt").write_bytes(b"\xef\xbb\xbfa\r\nb")
    assert load_text(str(tmp_path / "text.txt"), "test")[0] == "a\r\nb"
    for name in ("a.jsonl", "a.json"):
        (tmp_path / name).write_text('{"text": "a"}\n')
        with pytest.raises(ValueError, match=f"{name}: JSON is no text; extract it first, e.g. jq -r .text"):
            load_text(str(tmp_path / name), "test")


def test_a_wrong_file_in_the_data_folder_is_refused(tmp_path):
    (tmp_path / "ptb").mkdir()
    (tmp_path / "ptb/ptb.valid.txt").write_text("not it")
    with pytest.raises(ValueError, match="not the published ptb/ptb.valid.txt"):
        find_file("ptb/ptb.valid.txt", tmp_path)
    with pytest.raises(FileNotFoundError, match="ptb/ptb.valid.txt: not in .*nowhere; fetch it by python -m extras.texts"):
        find_file("ptb/ptb.valid.txt", tmp_path / "nowhere")


# ---------------------------------------------------------------------------------------------------- windows

def test_windows_do_not_overlap_and_the_tail_is_dropped():
    tokens = torch.arange(11)
    assert consecutive_windows(tokens, 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert consecutive_windows(tokens, 4, limit=1).tolist() == [[0, 1, 2, 3]]
    with pytest.raises(ValueError, match="11 tokens.* 12"):
        consecutive_windows(tokens, 12)


def test_random_windows_are_seeded_full_and_everywhere():
    tokens = torch.arange(100, 130)
    windows, offsets = random_windows(tokens, 500, 8, seed=3)
    assert torch.equal(windows, torch.stack([tokens[o:o + 8] for o in offsets]))
    assert offsets.min() == 0 and offsets.max() == 22  # the last offset with a full window
    assert torch.equal(windows, random_windows(tokens, 500, 8, seed=3)[0])
    assert not torch.equal(windows, random_windows(tokens, 500, 8, seed=4)[0])
    with pytest.raises(ValueError, match="30 tokens.* 31"):
        random_windows(tokens, 1, 31, seed=0)


def test_calibration_windows_come_with_their_description(tmp_path):
    (tmp_path / "text").write_text("def f(x): return x\n" * 40)
    tokenizer = load_tokenizer(TINY)
    windows, description = calibration_windows(tokenizer, str(tmp_path / "text"), 5, 8, seed=3)
    tokens = tokenizer.stream((tmp_path / "text").read_text())
    expected, offsets = random_windows(tokens, 5, 8, seed=3)
    assert torch.equal(windows, expected)
    assert (description["text"], description["tokens"]) == ("the file as it stands", len(tokens))
    assert description["offsets"] == offsets.tolist()


def test_windows_of_several_texts(tmp_path):
    """ "A+B": half of the windows from each text, at the offsets that each would have alone, in random order."""
    tokenizer, (a, b) = load_tokenizer(TINY), [str(tmp_path / name) for name in ("a", "b")]
    (tmp_path / "a").write_text("def f(x): return x\n" * 40)
    (tmp_path / "b").write_text("for i in range(9): print(i)\n" * 40)
    windows, description = calibration_windows(tokenizer, f"{a}+{b}", 5, 8, seed=3)
    alone = [calibration_windows(tokenizer, text, count, 8, seed=3) for text, count in ((a, 2), (b, 3))]
    order = description["order"]
    assert sorted(order) == [*range(5)] != order
    assert torch.equal(windows, torch.cat([part for part, _ in alone])[order])
    assert torch.equal(windows, calibration_windows(tokenizer, f"{a}+{b}", 5, 8, seed=3)[0])
    assert description["parts"] == [part for _, part in alone]
    assert description["protocol"] == " + ".join(part["protocol"] for _, part in alone)
    (tmp_path / "a+b").write_text("x = 1\n" * 99)  # a file of that name is that file
    assert "parts" not in calibration_windows(tokenizer, str(tmp_path / "a+b"), 5, 8, seed=3)[1]
    with pytest.raises(FileNotFoundError, match="no text 'nowhere'"):
        calibration_windows(tokenizer, f"{a}+nowhere", 5, 8, seed=3)


def test_the_first_windows_are_of_all_texts(tmp_path):
    """The redundancy sweep may stop after some of them: the layers must not be those of the first text alone."""
    text, model, tokenizer = tmp_path / "digits", load_checkpoint(TINY), load_tokenizer(TINY)
    generator = torch.Generator().manual_seed(0)
    text.write_text(" ".join(map(str, torch.randint(10 ** 6, (20_000,), generator=generator).tolist())))
    chosen = {}
    for name in (str(text), "embedded", f"{text}+embedded", f"embedded+{text}"):
        windows, _ = calibration_windows(tokenizer, name, 128, 64, seed=42)
        chosen[name] = find_redundant(model, lambda label: windows.split(16), 3)[1]
    digits, embedded, *both = chosen.values()
    assert digits == [4, 5, 6] and embedded == [3, 4, 5] and both == [embedded, embedded]
