"""What pyproject.toml cannot say: the wheel's name when there was no compiler, and the README for an index page."""

import re
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel

HERE = Path(__file__).parent


class Wheel(bdist_wheel):
    """A wheel for this platform if the kernel was built, else one for any: a name that promises what is in it."""

    def run(self):
        self.run_command("build_ext")
        build = self.get_finalized_command("build_ext")
        if not all(Path(build.get_ext_fullpath(ext.name)).is_file() for ext in build.extensions):
            self.distribution.ext_modules = []
            self.root_is_pure = True
        super().run()


def description():
    """The README without what only leads somewhere within the repository: pictures, and the targets of links."""
    text = (HERE / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"^!\[[^]]*\]\((?!https?:)[^)]*\)\n+", "", text, flags=re.M)
    return re.sub(r"\[([^]]+)\]\((?!https?:)[^)]*\)", r"\1", text)


setup(
    cmdclass={"bdist_wheel": Wheel},
    long_description=description(),
    long_description_content_type="text/markdown",
)
