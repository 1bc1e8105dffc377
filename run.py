"""The one entry point: a Hydra app. One config is one trial; `-m` makes a sweep.

python run.py -m format=mxfp4,nvfp4 transform=h,wush
"""

from experiments.app import main

if __name__ == "__main__":
    main()
