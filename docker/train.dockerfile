# Trains: the plain papermill command, on a notebook of nbs/.
#   docker build -f docker/train.dockerfile --build-arg COMMIT=$(git rev-parse HEAD) -t train .
#   docker run --rm -v "$PWD/runs:/runs" train nbs/train.ipynb /runs/out.ipynb -p recipe fast
# Behind a package mirror: --secret id=pipconf,src=pip.conf
FROM python:3.11-slim-bookworm

RUN useradd --create-home --uid 1000 app \
    && mkdir -p /app /runs /data \
    && chown app:app /app /runs /data
WORKDIR /app

# the requirements change less often than the code: a layer of their own
COPY settings.ini setup.py pyproject.toml README.md LICENSE ./
RUN --mount=type=secret,id=pipconf,target=/etc/pip.conf \
    mkdir project && touch project/__init__.py \
    && pip install --no-cache-dir --editable .
COPY project project
COPY nbs nbs

# the commit, for the record of a run: there is no repository in here
ARG COMMIT=""
ENV PROJECT_COMMIT=$COMMIT \
    PROJECT_ROOT=/app \
    PROJECT_DATA=/data \
    PROJECT_RUNS=/runs \
    GOMP_SPINCOUNT=10000
USER 1000
ENTRYPOINT ["papermill"]
CMD ["nbs/train.ipynb", "/runs/train.ipynb"]
