"""Where a merged checkpoint can be put."""

import pytest

from tests.support.adapter_folders import base_folder, our_adapter
from training.exporting import Sources
from training.merge import main

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def run(folder, output):
    our_adapter(base_folder(folder / "base"), folder / "adapter")
    main(["--adapter", str(folder / "adapter"), "--output_dir", str(output)])


def test_a_place_where_no_folder_can_be_made_is_refused_before_a_weight_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(Sources, "load", lambda self: pytest.fail("the model was loaded"))
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=r"`--output_dir` .* cannot be made there: .*file is no folder"):
        run(tmp_path, tmp_path / "file" / "merged")


@pytest.mark.parametrize("exists", [True, False], ids=["to an empty folder", "to nothing"])
def test_a_link_is_followed(exists, tmp_path):
    target = tmp_path / "disk" / "merged"
    (target if exists else target.parent).mkdir(parents=True)
    (tmp_path / "link").symlink_to(target)
    run(tmp_path, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (target / "model.safetensors").is_file()
    assert [*target.parent.iterdir()] == [target]
