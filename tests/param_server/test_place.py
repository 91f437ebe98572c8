"""Place: a name is a name, and leads nowhere else."""

import pytest

from distbelief.param_server.place import inside

ELSEWHERE = [
    *("", ".", "..", "../x", "/etc/passwd", "a/b", "a\\b", "a\0b", "x\n", "-rf", ".hidden"),
    *("UPPER", "ümlaut", "x" * 65, "a b", "$(id)", "<b>"),
]


@pytest.mark.parametrize("name", ELSEWHERE)
def test_what_is_no_name_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="is no name of a file"):
        inside(tmp_path, name)


@pytest.mark.parametrize("name", ["w0", "tensors.safetensors", "e000001-v000000000540-000001"])
def test_names_are_found_in_the_folder(tmp_path, name):
    assert inside(tmp_path, name) == tmp_path / name


def test_a_link_is_not_followed(tmp_path):
    (tmp_path / "inner").mkdir()
    for name, target in (("out", "/etc"), ("back", "inner"), ("gone", "nowhere")):
        (tmp_path / name).symlink_to(target)
        with pytest.raises(ValueError, match=f"is a link to {target}"):
            inside(tmp_path, name)
