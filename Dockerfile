# ConceptSeg-HF on CPU:  docker build -t conceptseg . && docker run --rm -v "$PWD:/data" conceptseg demo
FROM python:3.11-slim
COPY . /src
RUN pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu --extra-index-url https://pypi.org/simple \
        torch==2.13.0 torchvision==0.28.0 \
    && pip install --no-cache-dir -c /src/constraints.txt "/src[batch,eval,train]" \
    && rm -r /src && useradd --create-home --uid 1000 user && mkdir /data && chown user /data
USER user
WORKDIR /data
ENTRYPOINT ["conceptseg"]
CMD ["--help"]
