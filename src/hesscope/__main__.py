"""python -m hesscope: the same as the command hesscope."""

from hesscope.cli.main import main

if __name__ == "__main__":
    main()
