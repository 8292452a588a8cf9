"""Programs that attack the sandbox or the grader. Each defines `answer(x)`, which should return 2 x.

None does so unless its attack succeeds, or it shows in another way that it did.

`{folder}` is a folder of the host that is readable and writable, `{pid}` the grader's process, `{secret}` what stands
in a file there and in the grader's environment, `{token}` a name that no other test uses. One that finds a way out of
the sandbox leaves the file `escaped`.
"""

FORGED = 'b"v" + (5).to_bytes(8, "little") + b"i\\x07\\0\\0\\0"'

PROGRAMS = {
    # Exhausting the machine
    "fork bomb": "import os\ndef answer(x):\n    while True: os.fork()",
    "fork bomb that swallows errors": """
import os
def answer(x):
    while True:
        try: os.fork()
        except OSError: pass
""",
    "thread bomb": """
import threading, time
def answer(x):
    while True: threading.Thread(target=time.sleep, args=(60,)).start()
""",
    "memory bomb": "def answer(x):\n    held = []\n    while True: held.append(bytearray(1 << 24))",
    "memory bomb in one piece": "def answer(x): return bytearray(1 << 40)",
    "memory beside the address space": "import os\ndef answer(x): return 2 * x if os.memfd_create('m') else 0",
    "big output": "def answer(x): return 'x' * (1 << 30)",
    "output of many small objects": "def answer(x): return [[] for _ in range(1 << 21)]",
    "endless printing": "def answer(x):\n    while True: print('x' * 10000, flush=True)",
    "endless loop": "def answer(x):\n    while True: pass",
    "endless loop while loading": "while True: pass\ndef answer(x): return 0",
    "endless sleep": "import time\ndef answer(x): time.sleep(10**6)",
    "endless generator": "def answer(x):\n    while True: yield x",
    "endless regular expression": "import re\ndef answer(x): return bool(re.match('(a+)+$', 'a' * 60 + 'b'))",
    "endless arithmetic in C": "def answer(x): return 9 ** 9 ** 9 % 7",
    "endless recursion": "def answer(x): return answer(x)",
    "endless recursion in C": """
import sys
sys.setrecursionlimit(10**9)
class Deep:
    def __repr__(self): return repr(self)
def answer(x): return repr(Deep())
""",
    "huge integer": "def answer(x): return 1 << 10**7",
    "deep nesting": """
def answer(x):
    held = []
    for _ in range(10**5): held = [held]
    return held
""",
    "cyclic list": "def answer(x):\n    held = []\n    held.append(held)\n    return held",
    "colliding members": "def answer(x): return {n * (2**61 - 1) for n in range(1, 2500)}",
    "file bomb": """
def answer(x):
    for n in range(10**6):
        with open(f'/tmp/{token}{n}', 'wb') as file: file.write(bytes(1 << 23))
""",
    "deep parentheses": "def answer(x): return " + "(" * 150 + "0" + ")" * 150,
    # Getting out
    "network": """
import socket
def answer(x):
    socket.create_connection(('127.0.0.1', {port}), 2)
    return 2 * x
""",
    "abstract socket": """
import socket
def answer(x):
    link = socket.socket(socket.AF_UNIX)
    link.connect('\\0{abstract}')
    return 2 * x
""",
    "environment": "import os\ndef answer(x): return 0 if '{secret}' not in str(os.environ) else 2 * x",
    "parent's environment": """
def answer(x): return 2 * x if open('/proc/{pid}/environ', 'rb').read() else 0
""",
    "any process's environment": """
import glob
def answer(x):
    for file in glob.glob('/proc/*/environ'):
        try:
            if open(file, 'rb').read(): return 2 * x
        except OSError: pass  # another user's, or gone by now
""",
    "home": "import os\ndef answer(x): return 2 * x if os.listdir(os.path.expanduser('~')) else 0",
    "reading a file": "def answer(x): return 2 * x if '{secret}' in open('{folder}/secret').read() else 0",
    "reading through a link": """
import os
def answer(x):
    if not os.path.islink('/tmp/{token}'): os.symlink('{folder}/secret', '/tmp/{token}')
    return 2 * x if '{secret}' in open('/tmp/{token}').read() else 0
""",
    "reading the repository": "def answer(x): return 2 * x if open('{repository}/pyproject.toml').read() else 0",
    "writing a file": "def answer(x): open('{folder}/escaped', 'w').write('x')",
    "writing with a posix call": "import os\ndef answer(x): os.open('{folder}/escaped', os.O_CREAT | os.O_WRONLY)",
    "writing to the system": "def answer(x):\n    open('/usr/lib/escaped', 'w')\n    return 2 * x",
    "rewriting the worker": "def answer(x):\n    open('/worker.py', 'a').write('#')\n    return 2 * x",
    "filling the root": "def answer(x):\n    open('/escaped', 'w')\n    return 2 * x",
    "leaving by the parent folder": """
import os
def answer(x):
    for _ in range(50): os.chdir('..')
    return 2 * x if os.path.exists('.{folder}') else 0
""",
    "mounting": """
import ctypes
def answer(x): return 2 * x if ctypes.CDLL(None).mount(b'none', b'/tmp', b'tmpfs', 0, None) == 0 else 0
""",
    "another user namespace": """
import ctypes
def answer(x): return 2 * x if ctypes.CDLL(None).unshare(0x10000000) == 0 else 0
""",
    "raising limits": """
import resource
def answer(x):
    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
    return 2 * x
""",
    "killing the parent": "import os\ndef answer(x):\n    os.kill({pid}, 0)\n    return 2 * x",
    "killing everyone": "import os\ndef answer(x): os.kill(-1, 9)",
    "killing the parent's group": "import os\ndef answer(x): os.killpg(os.getpgid(os.getppid()), 9)",
    "tracing the parent": """
import ctypes
def answer(x): return 2 * x if ctypes.CDLL(None).ptrace(16, {pid}, 0, 0) == 0 else 0
""",
    "running a program": "import subprocess\ndef answer(x): subprocess.run(['touch', '{folder}/escaped'])",
    "becoming a program": "import os\ndef answer(x): os.execv('/usr/bin/touch', ['touch', '{folder}/escaped'])",
    "spawning a program": """
import os
def answer(x): os.posix_spawn('/usr/bin/touch', ['touch', '{folder}/escaped'], {})
""",
    "typing into the terminal": """
import fcntl, termios
def answer(x):
    for descriptor in range(16):
        try: fcntl.ioctl(descriptor, termios.TIOCSTI, b'x')
        except OSError: pass
""",
    # Passing without the answer
    "leaving early": "import sys\nsys.exit(0)\ndef answer(x): return 0",
    "leaving in the call": "import sys\ndef answer(x): sys.exit(0)",
    "leaving at once": "import os\ndef answer(x): os._exit(0)",
    "leaving while loading": "import os\nos._exit(0)\ndef answer(x): return 0",
    "ending by a signal": "import os\ndef answer(x): os.kill(os.getpid(), 9)",
    "stopping itself": "import os, signal\ndef answer(x): os.kill(os.getpid(), signal.SIGSTOP)",
    "crashing the interpreter": "import ctypes\ndef answer(x): ctypes.string_at(0)",
    "equal to everything": """
class Equal:
    def __eq__(self, other): return True
    def __hash__(self): return 0
def answer(x): return Equal()
""",
    "integer equal to everything": """
class Equal(int):
    def __eq__(self, other): return True
    def __index__(self): return 42
    def __int__(self): return 42
def answer(x): return Equal(0)
""",
    "list of things equal to everything": """
class Equal(str):
    def __eq__(self, other): return True
    __hash__ = str.__hash__
def answer(x): return [Equal('x')]
""",
    "lying about its class": """
class Liar:
    __class__ = int
    def __index__(self): return 42
def answer(x): return Liar()
""",
    "frame inspection": """
import sys
def answer(x):
    frame = sys._getframe()
    while frame:
        for name in ('expected', 'wanted', 'outputs', 'truth'):
            if name in frame.f_locals: return frame.f_locals[name]
        frame = frame.f_back
""",
    "searching memory": """
import gc
def answer(x):
    for thing in gc.get_objects():
        if isinstance(thing, dict) and 'expected' in thing: return thing['expected']
""",
    "printing success": "def answer(x): print('correct', 'pass', 'PASSED', 'OK', 1)",
    "patching the checker": """
import builtins, json, marshal, operator, sys
marshal.dumps = marshal.loads = json.dumps = lambda *_: b'i' + (42).to_bytes(4, 'little')
for module in list(sys.modules.values()):
    for name in ('accepts', 'encode', 'describe', 'plain', 'check', 'settle'):
        if hasattr(module, name): setattr(module, name, lambda *_: True)
operator.eq = lambda *_: True
def answer(x): return 0
""",
    "patching built-ins": """
import builtins
builtins.len = builtins.isinstance = builtins.all = builtins.abs = lambda *_: True
def answer(x): return 0
""",
    "removing modules": "import sys\nsys.modules.clear()\ndef answer(x): return 0",
    "tracing": "import sys\nsys.settrace(lambda *_: None)\nsys.setprofile(lambda *_: 1 / 0)\ndef answer(x): return 0",
    "garbage to every descriptor": """
import os
def answer(x):
    for descriptor in range(64):
        try: os.write(descriptor, b'correct' * 100)
        except OSError: pass
""",
    "forged replies to every descriptor": f"""
import os
for descriptor in range(64):
    try: os.write(descriptor, (b"l" + bytes(8)) + ({FORGED}) * 3)
    except OSError: pass
def answer(x): return 0
""",
    "forged replies of great length": """
import os
def answer(x):
    for descriptor in range(3, 64):
        try: os.write(descriptor, b"v" + b"\\xff" * 8)
        except OSError: pass
    while True: pass
""",
    "a reply that comes byte by byte": """
import os, time
def answer(x):
    for byte in b"v" + (1 << 20).to_bytes(8, "little") + bytes(1 << 20):
        for descriptor in range(3, 64):
            try: os.write(descriptor, bytes([byte]))
            except OSError: pass
        time.sleep(0.01)
""",
    "closing every descriptor": "import os\ndef answer(x): os.closerange(0, 64)",
    "a thread that writes replies": f"""
import os, threading
def write():
    while True:
        for descriptor in range(3, 64):
            try: os.write(descriptor, {FORGED})
            except OSError: pass
threading.Thread(target=write, daemon=True).start()
def answer(x):
    while True: pass
""",
    "ignoring signals": """
import signal
for number in range(1, 64):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
def answer(x):
    while True: pass
""",
    "swallowing interrupts": """
def answer(x):
    while True:
        try:
            while True: pass
        except BaseException: pass
""",
    "stopping the clock": """
import time
time.time = time.monotonic = time.perf_counter = lambda: 0.0
def answer(x):
    while True: pass
""",
    "at exit": "import atexit, os\natexit.register(os._exit, 0)\ndef answer(x): return 0",
    "a finalizer": """
class Last:
    def __del__(self): raise SystemExit(0)
last = Last()
def answer(x): return Last()
""",
    "changing the input in place": "def answer(x, box=[]):\n    box.append(x)\n    return box",
    "an exception that says it passed": "class correct(BaseException): pass\ndef answer(x): raise correct",
    "no such function": "def other(x): return 2 * x",
    "not a program": "def answer(x:",
    "a null byte": "def answer(x): return '\0'",
    "lone surrogate": "def answer(x): return '\\ud800'",
    "nan": "def answer(x): return float('nan')",
    "nothing": "def answer(x): pass",
}
