"""Trees of files as a kernel shows them: /proc/self, cgroup mounts, and processors' topology."""

from pathlib import Path


class FakeMachine:
    """What a process sees of its machine, under a directory of ours."""

    def __init__(self, path: Path) -> None:
        self.proc = path / "proc"
        self.sysfs = path / "cpu"
        self._cgroups = path / "cgroup"
        self.proc.mkdir()

    def cgroups(self, *own: str, mounts: tuple[str, ...]) -> None:
        """Be in the cgroups `own` (lines of /proc/self/cgroup).

        A mount is `KIND ROOT DIRECTORY OPTIONS`, the directory relative to where all are.
        """
        (self.proc / "cgroup").write_text("".join(f"{line}\n" for line in own))
        lines = ["22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/root rw"]
        for number, mount in enumerate(mounts):
            kind, root, directory, options = mount.split()
            where = str(self._cgroups / directory).replace(" ", "\\040")
            lines.append(
                f"{30 + number} 22 0:{number} {root} {where} rw,nosuid shared:{number} "
                f"- {kind} {kind} rw,{options}"
            )
        (self.proc / "mountinfo").write_text("\n".join(lines) + "\n")

    def version_2(self, own: str = "/", root: str = "/") -> None:
        self.cgroups(f"0::{own}", mounts=(f"cgroup2 {root} . nsdelegate",))

    def version_1(self, own: str = "/", root: str = "/") -> None:
        self.cgroups(
            f"5:memory:{own}",
            f"4:cpu,cpuacct:{own}",
            "1:name=systemd:/somewhere",
            mounts=(
                f"cgroup {root} memory memory",
                f"cgroup {root} cpu,cpuacct cpu,cpuacct",
                "cgroup / systemd name=systemd",
            ),
        )

    def write(self, path: str, text: str) -> None:
        """A file below the cgroup mounts."""
        file = self._cgroups / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")

    def dirs(self, *paths: str) -> list[Path]:
        return [self._cgroups / path for path in paths]

    def processors(self, *siblings: str) -> None:
        """One processor for each list of the hardware threads on its core."""
        for number, text in enumerate(siblings):
            topology = self.sysfs / f"cpu{number}" / "topology"
            topology.mkdir(parents=True)
            (topology / "thread_siblings_list").write_text(f"{text}\n")
