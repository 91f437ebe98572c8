import json

from distbelief.grants import FILE, Grants


def test_numbers_rise_by_name_and_over_launchers(tmp_path):
    grants = Grants(tmp_path)
    assert [grants.next("w0"), grants.next("w0"), grants.next("shard0")] == [1, 2, 1]
    assert Grants(tmp_path).next("w0") == 3
    assert Grants(tmp_path).last("shard0") == 1
    assert Grants(tmp_path).last("w7") == 0


def test_a_number_is_on_disk_before_it_is_given(tmp_path):
    number = Grants(tmp_path).next("shard1")
    assert json.loads((tmp_path / FILE).read_text()) == {"shard1": number}
    assert sorted(path.name for path in tmp_path.iterdir()) == [FILE]


def test_the_first_number_of_a_resumed_run_is_not_below_its_attempt(tmp_path):
    grants = Grants(tmp_path, least=4)
    assert [grants.next("w0"), grants.next("w0")] == [4, 5]
    assert Grants(tmp_path, least=2).next("w0") == 6


def test_a_damaged_file_counts_as_none(tmp_path):
    (tmp_path / FILE).write_text("{")
    assert Grants(tmp_path, least=3).next("w0") == 3
