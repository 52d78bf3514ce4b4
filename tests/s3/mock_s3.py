# SPDX-License-Identifier: Apache-2.0
"""An object store that speaks S3, checks what it is told (signatures, checksums, times), and misbehaves on request.

Written from the documentation of S3 and from nothing of this library. Rules come as JSON in POST /_control:
  {"reset": true}                       forget all rules, offsets and counts; objects stay
  {"do": ..., "method": "PUT", "path": "part of it", "nth": 1, "times": 1, "value": ...}
     503, 429, 500 (value: Retry-After)    answers so, and does nothing
     "drop"                                closes the connection, and does nothing
     "lose"                                does it, and closes the connection
     "truncate"                            sends half of the body that it announces
     "delay"                               answers value seconds later
     "200-error"                           answers 200 with an error in the body, and does nothing
  {"clock": seconds}                    its clock is ahead by so much
  {"page": n}                           lists have at most n entries
  {"stale_lists": true}                 lists are as they are now, from now on
  {"ignore_conditions": true}           If-Match and If-None-Match of puts are not looked at
  {"fill": ["bucket", "prefix", n]}     puts n objects of one byte
  {"age": ["path", seconds]}            the object was changed so long ago
GET /_control answers {"requests": n, "hits": n, "most_at_once": n, "uploads": n}.
"""
import base64
import email.utils
import hashlib
import hmac
import http.server
import json
import re
import threading
import time
import urllib.parse
import xml.sax.saxutils

ACCESS_KEY, SECRET_KEY, TOKEN = "AKIDMOCKMOCKMOCKMOCK", "mock/secret+key/that/nobody/may/ever/print", "mock-session-token/that/nobody/may/print"


def crc64_table(bits):
    polynomial = 0x9A6C9329AC4BC9B5   # 0xad93d23594c93659, reflected
    table = []
    for crc in range(1 << bits):
        for _ in range(bits):
            crc = crc >> 1 ^ (polynomial if crc & 1 else 0)
        table.append(crc)
    return table


TABLE8, TABLE16 = crc64_table(8), crc64_table(16)


def crc64(data):
    crc, table, even = 0xFFFFFFFFFFFFFFFF, TABLE16, len(data) & ~1
    for pair in memoryview(data)[:even].cast("H"):
        crc = table[(crc ^ pair) & 65535] ^ crc >> 16
    for byte in data[even:]:
        crc = TABLE8[(crc ^ byte) & 255] ^ crc >> 8
    return base64.b64encode((crc ^ 0xFFFFFFFFFFFFFFFF).to_bytes(8, "big")).decode()


class Refused(Exception):
    def __init__(self, status, code, extra=""):
        self.status, self.code, self.extra = status, code, extra


class Store:
    def __init__(self):
        self.lock = threading.RLock()
        self.objects = {}   # (bucket, key) -> (bytes, etag, time)
        self.buckets = {"bucket"}
        self.uploads = {}   # id -> (bucket, key, {number: (bytes, etag)}, wants checksum)
        self.next_upload = self.at_once = 0
        self.reset()

    def reset(self):
        self.rules, self.clock, self.page, self.snapshot, self.ignore_conditions = [], 0, 1000, None, False
        self.requests = self.hits = self.most_at_once = 0

    def now(self):
        return time.time() + self.clock


STORE = Store()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60
    disable_nagle_algorithm = True   # headers and body are written one after the other

    def log_message(self, *_):
        pass

    def date_time_string(self, timestamp=None):
        return email.utils.formatdate(STORE.now() if timestamp is None else timestamp, usegmt=True)

    def answer(self, status, body=b"", headers=None, announce=None):
        if getattr(self, "lost", False):
            raise ConnectionAbortedError
        if isinstance(body, str):
            body = body.encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if "Content-Length" not in (headers or {}):
            self.send_header("Content-Length", str(len(body) if announce is None else announce))
        self.end_headers()
        if self.command == "HEAD":
            return
        if getattr(self, "truncated", False) and len(body) > 1:
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            raise ConnectionAbortedError
        self.wfile.write(body)

    # As the real one does, it repeats what was signed: whoever prints this tells secrets.
    def refuse(self, status, code, extra=""):
        self.answer(status, f"<?xml version=\"1.0\"?><Error><Code>{code}</Code><Message>{code}: {ACCESS_KEY} {SECRET_KEY} {TOKEN}</Message>"
                            f"<AWSAccessKeyId>{ACCESS_KEY}</AWSAccessKeyId>{extra}</Error>", {"Content-Type": "application/xml"})

    def check_signature(self, path, query, body):
        authorization = self.headers.get("Authorization", "")
        match = re.fullmatch(r"AWS4-HMAC-SHA256 Credential=([^/]+)/(\d{8})/([^/]+)/s3/aws4_request,\s*SignedHeaders=([^,]+),\s*Signature=([0-9a-f]{64})", authorization)
        if not match:
            raise Refused(403, "AccessDenied")
        key, date, region, names, signature = match.groups()
        if key != ACCESS_KEY:
            raise Refused(403, "InvalidAccessKeyId")
        names = names.split(";")
        assert names == sorted(names)
        for name in self.headers.keys():
            if name.lower().startswith("x-amz-") and name.lower() not in names:
                raise Refused(403, "AccessDenied")
        if "host" not in names or self.headers.get("x-amz-security-token") != TOKEN:
            raise Refused(403, "InvalidToken")
        when = self.headers["x-amz-date"]
        assert when[:8] == date
        quote = lambda text: urllib.parse.quote(text, safe="-._~")
        canonical = "\n".join([
            self.command,
            urllib.parse.quote(path, safe="/-._~"),
            "&".join(sorted(f"{quote(name)}={quote(value)}" for name, value in query)),
            "".join(f"{name}:{' '.join(self.headers[name].split())}\n" for name in names),
            ";".join(names),
            self.headers["x-amz-content-sha256"],
        ])
        text = "\n".join(["AWS4-HMAC-SHA256", when, f"{date}/{region}/s3/aws4_request", hashlib.sha256(canonical.encode()).hexdigest()])
        step = b"AWS4" + SECRET_KEY.encode()
        for part in (date, region, "s3", "aws4_request", text):
            step = hmac.new(step, part.encode(), hashlib.sha256).digest()
        if not hmac.compare_digest(step.hex(), signature):
            raise Refused(403, "SignatureDoesNotMatch", f"<StringToSign>{text}</StringToSign>")
        signed = email.utils.parsedate_to_datetime(time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.strptime(when, "%Y%m%dT%H%M%SZ"))).timestamp()
        if abs(signed - STORE.now()) > 900:
            raise Refused(403, "RequestTimeTooSkewed")
        if self.headers["x-amz-content-sha256"] != "UNSIGNED-PAYLOAD" and self.headers["x-amz-content-sha256"] != hashlib.sha256(body).hexdigest():
            raise Refused(400, "XAmzContentSHA256Mismatch")

    def check_checksum(self, body):
        told = self.headers.get("x-amz-checksum-crc64nvme")
        if told is None:
            raise Refused(400, "MissingChecksum")   # this library sends one with all that it puts
        if told != crc64(body):
            raise Refused(400, "BadDigest")

    def control(self, body):
        if self.command == "GET":
            with STORE.lock:
                return self.answer(200, json.dumps({"requests": STORE.requests, "hits": STORE.hits, "most_at_once": STORE.most_at_once, "uploads": len(STORE.uploads)}))
        rule = json.loads(body)
        with STORE.lock:
            if rule.get("reset"):
                STORE.reset()
            elif "clock" in rule:
                STORE.clock = rule["clock"]
            elif "page" in rule:
                STORE.page = rule["page"]
            elif "stale_lists" in rule:
                STORE.snapshot = dict(STORE.objects)
            elif "ignore_conditions" in rule:
                STORE.ignore_conditions = True
            elif "fill" in rule:
                bucket, prefix, count = rule["fill"]
                for i in range(count):
                    STORE.objects[bucket, f"{prefix}{i:06}"] = (b"x", '"x"', STORE.now())
            elif "age" in rule:
                bucket, key = rule["age"][0].lstrip("/").split("/", 1)
                data, etag, _ = STORE.objects[bucket, key]
                STORE.objects[bucket, key] = (data, etag, STORE.now() - rule["age"][1])
            else:
                STORE.rules.append([rule, 0])
        self.answer(200)

    def handle_request(self):
        self.lost = self.truncated = False
        raw_path, _, raw_query = self.path.partition("?")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if raw_path == "/_control":
            return self.control(body)
        path = urllib.parse.unquote(raw_path)
        query = urllib.parse.parse_qsl(raw_query, keep_blank_values=True)
        hit = None
        with STORE.lock:
            STORE.requests += 1
            STORE.at_once += 1
            STORE.most_at_once = max(STORE.most_at_once, STORE.at_once)
            for entry in STORE.rules:
                rule = entry[0]
                if rule.get("method", self.command) != self.command or rule.get("path", "") not in self.path:
                    continue
                entry[1] += 1
                if hit is None and rule.get("nth", 1) <= entry[1] < rule.get("nth", 1) + rule.get("times", 1):
                    hit = rule
            STORE.hits += hit is not None
        try:
            if hit is not None:
                what = hit["do"]
                if what in (429, 500, 503):
                    code = {429: "TooManyRequests", 500: "InternalError", 503: "SlowDown"}[what]
                    headers = {"Retry-After": str(hit["value"])} if "value" in hit else {}
                    return self.answer(what, f"<Error><Code>{code}</Code></Error>", headers)
                if what == "drop":
                    raise ConnectionAbortedError
                if what == "200-error":
                    return self.answer(200, "<?xml version=\"1.0\"?>\n<Error><Code>InternalError</Code></Error>")
                if what == "delay":
                    time.sleep(hit["value"])
                self.lost, self.truncated = what == "lose", what == "truncate"
            try:
                self.check_signature(path, query, body)
                self.serve(path, dict(query), body)
            except Refused as refused:
                self.refuse(refused.status, refused.code, refused.extra)
        except ConnectionAbortedError:
            self.close_connection = True
            try:
                self.connection.shutdown(2)
            except OSError:
                pass
        finally:
            with STORE.lock:
                STORE.at_once -= 1

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_request

    def serve(self, path, query, body):
        bucket, _, key = path.lstrip("/").partition("/")
        if bucket not in STORE.buckets:
            raise Refused(404, "NoSuchBucket")
        if not key:
            return self.list_uploads(bucket, query) if "uploads" in query else self.list_objects(bucket, query)
        handler = {"GET": self.get, "HEAD": self.get, "PUT": self.put, "DELETE": self.delete, "POST": self.post}[self.command]
        handler(bucket, key, query, body)

    def get(self, bucket, key, query, body):
        with STORE.lock:
            found = STORE.objects.get((bucket, key))
        if found is None:
            raise Refused(404, "NoSuchKey")
        data, etag, changed = found
        if self.headers.get("If-Match", etag) != etag:
            raise Refused(412, "PreconditionFailed")
        headers = {"ETag": etag, "Last-Modified": email.utils.formatdate(changed, usegmt=True)}
        if self.command == "HEAD":
            headers["Content-Length"] = str(len(data))
            return self.answer(200, b"", headers)
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not match:
            return self.answer(200, data, headers)
        begin, end = int(match[1]), min(int(match[2]) + 1, len(data))
        if begin >= len(data):
            raise Refused(416, "InvalidRange")
        headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(data)}"
        self.answer(206, data[begin:end], headers)

    def put(self, bucket, key, query, body):
        self.check_checksum(body)
        etag = '"' + hashlib.md5(body).hexdigest() + '"'
        with STORE.lock:
            if "uploadId" in query:
                upload = STORE.uploads.get(query["uploadId"])
                if upload is None or upload[:2] != (bucket, key):
                    raise Refused(404, "NoSuchUpload")
                upload[2][int(query["partNumber"])] = (body, etag)
            else:
                there = STORE.objects.get((bucket, key))
                if not STORE.ignore_conditions:
                    if self.headers.get("If-None-Match") == "*" and there is not None:
                        raise Refused(412, "PreconditionFailed")
                    if "If-Match" in self.headers:
                        if there is None:
                            raise Refused(404, "NoSuchKey")
                        if self.headers["If-Match"] != there[1]:
                            raise Refused(412, "PreconditionFailed")
                STORE.objects[bucket, key] = (body, etag, STORE.now())
        self.answer(200, b"", {"ETag": etag})

    def delete(self, bucket, key, query, body):
        with STORE.lock:
            if "uploadId" in query:
                if STORE.uploads.pop(query["uploadId"], None) is None:
                    raise Refused(404, "NoSuchUpload")
            else:
                STORE.objects.pop((bucket, key), None)
        self.answer(204)

    def post(self, bucket, key, query, body):
        if "uploads" in query:
            if self.headers.get("x-amz-checksum-algorithm") != "CRC64NVME" or self.headers.get("x-amz-checksum-type") != "FULL_OBJECT":
                raise Refused(400, "MissingChecksum")
            with STORE.lock:
                STORE.next_upload += 1
                upload = f"upload-{STORE.next_upload}"
                STORE.uploads[upload] = (bucket, key, {})
            return self.answer(200, f"<InitiateMultipartUploadResult><UploadId>{upload}</UploadId></InitiateMultipartUploadResult>")
        with STORE.lock:
            upload = STORE.uploads.get(query.get("uploadId"))
            if upload is None:
                raise Refused(404, "NoSuchUpload")
            named = re.findall(r"<Part><PartNumber>(\d+)</PartNumber><ETag>(.*?)</ETag></Part>", body.decode())
            parts = []
            for i, (number, etag) in enumerate(named):
                data, known = upload[2].get(int(number), (b"", ""))
                if int(number) != i + 1 or known != etag.replace("&quot;", '"'):
                    raise Refused(400, "InvalidPart")
                if i + 1 < len(named) and len(data) < 5 << 20:
                    raise Refused(400, "EntityTooSmall")
                parts.append(data)
            data = b"".join(parts)
        self.check_checksum(data)
        with STORE.lock:
            etag = f'"{hashlib.md5(data).hexdigest()}-{len(parts)}"'
            STORE.objects[bucket, key] = (data, etag, STORE.now())
            STORE.uploads.pop(query["uploadId"], None)
        self.answer(200, f"<CompleteMultipartUploadResult><ETag>{xml.sax.saxutils.escape(etag)}</ETag></CompleteMultipartUploadResult>")

    def list_objects(self, bucket, query):
        prefix, delimiter, after = query.get("prefix", ""), query.get("delimiter", ""), query.get("continuation-token", "")
        with STORE.lock:
            objects = STORE.snapshot if STORE.snapshot is not None else STORE.objects
            keys = sorted((key, len(value[0])) for (of, key), value in objects.items() if of == bucket and key.startswith(prefix))
            most = min(int(query.get("max-keys", 1000)), STORE.page)
        encode = (lambda text: urllib.parse.quote(text, safe="/-._~*").replace("%20", "+")) if query.get("encoding-type") == "url" else xml.sax.saxutils.escape
        entries = {}
        for key, size in keys:
            rest = key[len(prefix):]
            if delimiter and delimiter in rest:
                entries.setdefault(prefix + rest.split(delimiter)[0] + delimiter, None)
            else:
                entries[key] = size
        names = [name for name in sorted(entries) if name > after]
        page, more = names[:most], len(names) > most
        text = f"<ListBucketResult><IsTruncated>{'true' if more else 'false'}</IsTruncated>"
        if more:
            text += f"<NextContinuationToken>{xml.sax.saxutils.escape(page[-1])}</NextContinuationToken>"
        for name in page:
            if entries[name] is None:
                text += f"<CommonPrefixes><Prefix>{encode(name)}</Prefix></CommonPrefixes>"
            else:
                text += f"<Contents><Key>{encode(name)}</Key><Size>{entries[name]}</Size></Contents>"
        self.answer(200, text + "</ListBucketResult>", {"Content-Type": "application/xml"})

    def list_uploads(self, bucket, query):
        with STORE.lock:
            text = "".join(f"<Upload><Key>{xml.sax.saxutils.escape(key)}</Key><UploadId>{upload}</UploadId></Upload>"
                           for upload, (of, key, _) in STORE.uploads.items() if of == bucket and key.startswith(query.get("prefix", "")))
        self.answer(200, f"<ListMultipartUploadsResult><IsTruncated>false</IsTruncated>{text}</ListMultipartUploadsResult>")


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *_):
        pass   # a client that was killed


def start():
    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server.server_address[1]
