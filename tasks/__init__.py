"""The paper's six benchmark tasks. See README.md."""
