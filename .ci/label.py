"""Try `label` as a person's browser does: python .ci/label.py COMMAND... FOLDER.

Starts the command on a folder of images without a table of labels, opens the address that it prints, gives the first
image a label, ends the command, and prints labels.csv.
"""

import json
import subprocess
import sys
import urllib.request
from pathlib import Path

*command, folder = sys.argv[1:]
page = subprocess.Popen([*command, "label", folder, "--no-browser"], stdout=subprocess.PIPE, text=True)
assert page.stdout is not None
try:
    address = next(line.split()[-1] for line in page.stdout if line.startswith("Label at "))
    browser = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
    browser.open(address).close()
    origin = address.partition("/?")[0]
    assert b"<script" in browser.open(f"{origin}/").read()
    token = json.load(browser.open(f"{origin}/state"))["token"]
    headers = {"Origin": origin, "X-Token": token, "Content-Type": "application/json"}
    answer = json.dumps({"ids": [0], "labels": ["cat"]}).encode()
    said = json.load(browser.open(urllib.request.Request(f"{origin}/label", answer, headers)))
    assert not said["fault"], said["fault"]
finally:
    page.terminate()
    page.wait()
table = Path(folder, "labels.csv").read_text("utf-8")
assert ",cat," in table, table
print(table)
