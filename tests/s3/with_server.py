# SPDX-License-Identifier: Apache-2.0
"""with_server.py moto|mock PROGRAM [ARGUMENT...]: runs the program beside an S3 server on loopback, with the environment that finds it."""
import logging
import os
import subprocess
import sys
import urllib.request

os.environ.update(no_proxy="127.0.0.1", NO_PROXY="127.0.0.1")
if sys.argv[1] == "moto":
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    port = server.get_host_and_port()[1]
    keys = {"AWS_ACCESS_KEY_ID": "AKIDMOTO", "AWS_SECRET_ACCESS_KEY": "moto-secret", "AWS_SESSION_TOKEN": ""}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/bucket", method="PUT", headers={"Authorization": "AWS4-HMAC-SHA256 Credential=AKIDMOTO/20260101/us-east-1/s3/aws4_request,SignedHeaders=host,Signature=0"})
    urllib.request.urlopen(request).read()
else:
    import mock_s3

    port = mock_s3.start()
    keys = {"AWS_ACCESS_KEY_ID": mock_s3.ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": mock_s3.SECRET_KEY, "AWS_SESSION_TOKEN": mock_s3.TOKEN}
environment = dict(os.environ, AWS_ENDPOINT_URL_S3=f"http://127.0.0.1:{port}", AWS_REGION="us-east-1", DCP_S3_SERVER=sys.argv[1], **keys)
sys.exit(subprocess.run(sys.argv[2:], env=environment, check=False).returncode)
