# Everything a change must pass.
check:
    ruff check .
    ruff format --check .
    mypy
    pytest -q

# Apply the formatter and the safe lint fixes.
format:
    ruff check --fix .
    ruff format .

# The long tests: deep networks, many seeds.
slow:
    pytest -q -m slow
