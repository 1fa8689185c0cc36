"""Which cgroups this process is in, as containers, batch systems and plain machines show it."""

import pytest
from cgroups import FakeMachine

from batchllm.cgroup import cgroup_dirs, read_int


@pytest.fixture
def machine(tmp_path):
    return FakeMachine(tmp_path)


def test_version_2_goes_from_the_process_up_to_the_mount(machine):
    machine.version_2("/user.slice/job.scope")
    expected = machine.dirs("user.slice/job.scope", "user.slice", ".")
    assert cgroup_dirs("cpu", machine.proc) == expected
    assert cgroup_dirs("memory", machine.proc) == expected


def test_version_1_has_a_tree_for_each_controller(machine):
    machine.cgroups(
        "5:memory:/slurm/job_7",
        "4:cpu,cpuacct:/slurm",
        mounts=("cgroup / memory memory", "cgroup / both cpu,cpuacct", "cgroup / pids pids"),
    )
    assert cgroup_dirs("memory", machine.proc) == machine.dirs(
        "memory/slurm/job_7", "memory/slurm", "memory"
    )
    assert cgroup_dirs("cpu", machine.proc) == machine.dirs("both/slurm", "both")


def test_a_machine_may_have_both(machine):
    machine.cgroups(
        "4:memory:/a", "0::/b", mounts=("cgroup / memory memory", "cgroup2 / unified nsdelegate")
    )
    found = cgroup_dirs("memory", machine.proc)
    assert sorted(found) == sorted(machine.dirs("memory/a", "memory", "unified/b", "unified"))
    assert cgroup_dirs("cpu", machine.proc) == machine.dirs("unified/b", "unified")


def test_a_container_that_knows_its_path_on_the_host(machine):
    machine.version_1("/docker/4f3a", root="/docker/4f3a")
    assert cgroup_dirs("memory", machine.proc) == machine.dirs("memory")


@pytest.mark.parametrize(
    ("own", "root"), [("/", "/../.."), ("/../other", "/"), ("/kube/a", "/kube/b")]
)
def test_a_path_of_another_namespace_leaves_what_is_mounted(machine, own, root):
    machine.version_2(own, root)
    assert cgroup_dirs("cpu", machine.proc) == machine.dirs(".")


def test_a_mount_that_has_our_path_goes_before_others(machine):
    machine.cgroups("0::/a", mounts=("cgroup2 /b elsewhere x", "cgroup2 / here x"))
    assert cgroup_dirs("cpu", machine.proc) == machine.dirs("here/a", "here")


def test_a_backslash_in_a_units_name(machine):
    machine.version_2("/a\\x2db/c", root="/a\\134x2db")
    assert cgroup_dirs("cpu", machine.proc) == machine.dirs("c", ".")


def test_blanks_in_a_path(tmp_path):
    (tmp_path / "with blank").mkdir()
    machine = FakeMachine(tmp_path / "with blank")
    machine.version_2("/a")
    assert cgroup_dirs("cpu", machine.proc) == machine.dirs("a", ".")


def test_no_cgroups(machine):
    assert cgroup_dirs("cpu", machine.proc) == []
    machine.cgroups(mounts=("cgroup2 / . x",))
    assert cgroup_dirs("cpu", machine.proc) == []
    (machine.proc / "mountinfo").write_text("nonsense\n\n - \n")
    assert cgroup_dirs("cpu", machine.proc) == []


def test_a_kernel_files_number(tmp_path):
    for text, number in (("12\n", 12), ("-1\n", -1), ("max\n", None), ("", None)):
        (tmp_path / "n").write_text(text)
        assert read_int(tmp_path / "n") == number
    assert read_int(tmp_path / "none") is None
