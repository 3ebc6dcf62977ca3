"""A data set of phantoms, interrupted and gone on with, and what the other scripts read of it."""

import pytest

from maisi_diffusers.phantom import names_of_tumors
from maisi_diffusers.training.checks import check_cases
from maisi_diffusers.training.data_list import read_data_list
from maisi_diffusers.training.phantom_dataset import tumors_of

from .training_data import load_script

SMALL = ["--size", "48", "48", "48", "--spacing", "8", "--num_folds", "2"]


def run(folder, *options):
    load_script("make_phantoms").main(["--output_dir", str(folder), *SMALL, *options])
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_data_set_is_complete_and_consistent(tmp_path):
    files = run(tmp_path / "phantoms", "--num_cases", "3", "--first_seed", "20")
    assert len(files) == 7
    data_list = read_data_list(tmp_path / "phantoms" / "dataset.json")
    assert check_cases(data_list, in_full=True) == []
    for case in data_list.cases:
        assert case.dim == (48, 48, 48) and len(case.organ_size) == 10
        assert case.modality in ("ct_wo_contrast", "ct_contrast")
    assert {case.fold for case in data_list.cases} == {0, 1}


def test_goes_on_where_it_was_interrupted_with_any_number_of_processes(tmp_path):
    whole = run(tmp_path / "whole", "--num_cases", "3", "--num_processes", "2")
    run(tmp_path / "parts", "--num_cases", "1")
    (tmp_path / "parts" / "phantom000000_labels.nii.gz").unlink()
    assert run(tmp_path / "parts", "--num_cases", "3") == whole


def test_one_region_for_all(tmp_path):
    run(tmp_path / "heads", "--num_cases", "2", "--body_region", "head", "--tumors", "0")
    for case in read_data_list(tmp_path / "heads" / "dataset.json").cases:
        assert case.top_region_index == (1, 0, 0, 0)


def test_cases_of_other_options_are_made_again(tmp_path):
    run(tmp_path / "phantoms", "--num_cases", "2", "--tumors", "0")
    again = run(tmp_path / "phantoms", "--num_cases", "2", "--tumors", "1")
    assert again == run(tmp_path / "new", "--num_cases", "2", "--tumors", "1")


@pytest.mark.parametrize(
    ("region", "tumors"),
    [
        (("head",), set()),
        (("Thorax",), {"lung tumor", "hepatic tumor", "bone lesion"}),
        (("lower",), {"colon cancer primaries", "bone lesion"}),
        (("abdomen", "pelvis"), {"hepatic tumor", "pancreatic tumor", "colon cancer primaries", "bone lesion"}),
        (("head", "abdomen"), set(names_of_tumors())),
    ],
)
def test_tumors_of_regions(region, tumors):
    assert set(tumors_of(region)) == tumors


def test_no_tumor_where_its_organ_is_out_of_view(tmp_path):
    narrow = ["--size", "16", "16", "16", "--spacing", "3", "--other_spacings", "0", "--tumors", "1"]
    run(tmp_path / "phantoms", "--num_cases", "6", *narrow, "--body_region", "abdomen")
    cases = read_data_list(tmp_path / "phantoms" / "dataset.json").cases
    assert len(cases) == 6 and any(max(case.organ_size[5:]) == -1 for case in cases)


def test_bad_number(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path, "--num_cases", "0")
    assert "argument --num_cases: 0 is not allowed" in capsys.readouterr().err
