"""Ten steps of the families that cut pictures into tiles give the losses of TRL's DPOTrainer."""

import shutil

import pytest

from tests.training.test_trl import STEPS, mark_first_words_only, rows_with_images, trl_losses, vapr_losses


def as_it_is(folder, copy):
    return folder


def asked_as_answered(folder, copy):
    """A LLaVA-OneVision whose template writes the same before an answer as where it asks for one.

    The published one writes a space more. TRL 1.16 scores that space and the line break, which at inference the model
    is given.
    """
    shutil.copytree(folder, copy)
    template = copy / "chat_template.jinja"
    text = template.read_text().replace("{{ message['role'] + ' ' }}", "{{ message['role'] }}")
    assert text != template.read_text()
    template.write_text(text)
    return copy


def mistral_tokenised_alike(folder, copy):
    """A LLaVA-NeXT for which TRL's ids are those of inference, as of LLaVA: a BOS in the template, and a mark of the
    first word of a text only where no space is."""
    shutil.copytree(folder, copy)
    template = copy / "chat_template.jinja"
    template.write_text("{{ bos_token }}" + template.read_text())
    mark_first_words_only(copy)
    return copy


@pytest.mark.parametrize(
    ("family", "prepared"),
    [("internvl", as_it_is), ("llava_onevision", asked_as_answered), ("llava_next", mistral_tokenised_alike)],
    ids=["internvl", "llava_onevision", "llava_next"],
)
def test_ten_steps_of_full_fine_tuning(family, prepared, tiny, photo_rows, photo_root, tmp_path):
    rows = rows_with_images(photo_rows, photo_root)
    folder = prepared(tiny(family), tmp_path / "copy")
    theirs = trl_losses(folder, family, rows, tmp_path, beta=0.1)
    ours = vapr_losses(folder, rows, photo_root, tmp_path)
    assert len(ours) == len(theirs) == STEPS
    assert abs(theirs[-1] - theirs[0]) > 0.01  # something was learned, so the updates agree too
    assert ours == pytest.approx(theirs, abs=1e-4)
