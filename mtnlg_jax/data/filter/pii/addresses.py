"""Checks of e-mail and IP addresses.

Each returns the end of the address in the line, or None if it is something else.
"""

import functools
import ipaddress
import re


def end_of_email(match: re.Match, _: int | None) -> int | None:
    """Check an e-mail address: its domain exists, and it is not a remote, a version or code."""
    line = match.string
    start = match.start()
    end = match.end()
    local = line[start : match.start("at")]
    domain = line[match.end("at") : end]
    before = line[max(0, start - 80) : start]
    if local in ("git", "hg", "svn") or before.endswith("@"):
        return None
    if (
        match["at"] == "@"
        and re.search(r"(?<!mailto):/{2}(?:[^\s/@:]*:)?[^\s/@]*$", before)
        or re.search(
            r"(?:^|[\s`$])(?:ssh|sftp|mosh|ssh-copy-id)(?: +-\S+(?: +[\w/.~]+)?)* +$", before
        )
    ):
        return None
    labels = domain.split(".")
    # A version (pkg@1.2.3), or an image of twice the size (logo@2x.png).
    numeric = sum(bool(re.fullmatch(r"v?[0-9]+|[0-9]x", label)) for label in labels[:-1])
    if numeric > (0 if re.fullmatch("[0-9]x", labels[0]) else 1):
        return None
    if not _is_domain(labels[-1]):
        # A sentence begins right after it: bob@example.com.Please write.
        rest = labels.pop()
        if len(labels) < 2 or not (
            labels[-1].lower() in _COMMON or rest[0].isupper() and _is_domain(labels[-1])
        ):
            return None
        return end - len(rest) - 1
    behind = line[end : end + 60]
    if labels[-1].lower() not in _COMMON and (
        behind.startswith("(") or _is_product(local, labels, before, behind)
    ):
        return None
    if path := re.match(r":(?!//)[\w~./][^\s,;]*", behind):
        copied = re.search(r"(?:^|[\s`$])(?:scp|rsync|sftp|git|hg|svn|sshfs)\s", line[:start])
        if copied or re.search(r"[/~]|\.[A-Za-z]{1,4}$", path[0]):
            return None
    return None if behind == ":" and re.search(r"(?:scp|rsync)\s", line[:start]) else end


_COMMON = frozenset("com org net edu gov mil cn uk de fr jp ru eu ca au kr tw hk".split())
# Top-level domains that are also attributes of arrays and objects.
_ATTRIBUTES = frozenset("data to dot id is map name tr at mt st in it so cc real".split())


def _is_product(local: str, labels: list[str], before: str, behind: str) -> bool:
    """Whether an address is a matrix product, as in ``y = x@w.data``."""
    if labels[-1] not in _ATTRIBUTES or not (local + labels[0]).isidentifier():
        return False
    return bool(
        re.search(r"(?:[=(+*/\[]|return|print)\s*$", before)
        or re.match(r"\s*[-+*/@\[\])]|\s*\n", behind)
        and "=" in before
    )


@functools.cache
def _is_domain(name: str) -> bool:
    """Whether a name is a top-level domain of the Public Suffix List, or reserved for examples."""
    import tld

    if not (name.islower() or name.isupper() or name.istitle() or not name.isascii()):
        return False
    return name.lower() in ("example", "test", "invalid") or tld.is_tld(name.lower())


_LIST = r"(?:[\s,;、/|]|and|or|to|->|-|和|或|到|至|<IP_ADDRESS>|[0-9]{1,3}(?:\.[0-9]{1,3}){3})*$"
_ADDRESS_WORD = re.compile(
    r"(?:(?<![A-Za-z])(?:ips?|ipv4|address(?:es)?|addr|host|hostname|server|dns|nameserver|resolver|"
    r"ping|traceroute|curl|telnet|nmap|whois|from|client|peer|gateway|proxy|router?|via|login|ssh|"
    r"listen|bind|src|dst|source|destination|remote|remote_addr|visitor|attacker|inet|ip_address|"
    r"ip_addr|client_ip|x-forwarded-for|banned?|block(?:ed)?|deny|allow)|"
    r"(?:https?|ftp|ssh|tcp|udp|rtsp|socks5)://(?:[^\s/@]*@)?|"
    r"地址|主机|服务器|来自|登录|登陆|网关|代理|解析|访问|客户端|封禁)"
    r"(?:[\"'*`）)]{0,2}\s?[:=\[(（]?|\s(?:is|was|at|of|=|==)|[是为])[\s\"'`*(\[<（]{0,4}" + _LIST,
    re.IGNORECASE,
)
_VERSION_WORD = re.compile(
    r"(?:(?<![A-Za-z])(?:version|versions|release|ver|v|r|build|firmware|driver|patch|update|"
    r"revision|rev|upgrade[ds]?|downgrade[ds]?|section|sections|sec|sect|chapter|clause|table|"
    r"figure|fig|appendix|annex|part|art|article|item|rule|paragraph|para|step|oid|"
    r"objectidentifier|object identifier|subsection|"
    r"requirement|req|exercise|theorem|equation|eq|see|cf)s?|版本号?|版|参?见|参阅|[§¶第]|章节|章|节|条款|条|表|图|"
    r"附录)"
    r"(?:[.:=]|\s(?:is|was|to|from|of)|号|为|是)?[\s\"'`*(\[（<>=~^:]{0,4}"
    r"(?:(?:[0-9]+\.)+[0-9]+(?:\s?[,、;/-]\s?|\s(?:and|or|to|through)\s|和|至|到))*$",
    re.IGNORECASE,
)
_PACKAGE = re.compile(r"[=<>~!]= ?$|[A-Za-z0-9\"'][~^]$")
_AGENT = re.compile(r"[A-Z][A-Za-z]*/$")
# The name of a product precedes a version: PostgreSQL 9.6.24.77, Windows 10.0.19.4.
_NAME = re.compile(
    r"(?:[A-Z][A-Za-z+#]*|[a-z]+[A-Z]\w*|(?<![A-Za-z])(?:openssl|openssh|nginx|linux|kernel|"
    r"python|java|jdk|gcc|clang|cmake|numpy|mysql|redis|node|npm|pip|bash|git|ruby|"
    r"php|perl|curl|wget|apache|tomcat|glibc|cuda|cudnn|tensorrt|libtpu|protobuf))"
    r"[\"'*`]{0,2} ?$"
)
_ADDRESS_BEHIND = re.compile(
    r":[0-9]{2,5}(?![0-9.])|/(?:[89]|[12][0-9]|3[0-2])(?![0-9.])|"
    r" - (?:-|\S+) \[|[\s,|\"]+(?:GET|POST|PUT|HEAD|DELETE) |"
    r"\s+(?:>|->) [0-9]"
)


def end_of_address(match: re.Match, _: int | None) -> int | None:
    """Check an IP address: public, and not a version, an object identifier or a section number."""
    try:
        address = ipaddress.ip_address(match[0])
    except ValueError:
        return None
    if not address.is_global or address.is_multicast:
        return None
    if address.version == 6:
        return match.end()
    text = match.string
    start = match.start()
    end = match.end()
    if re.match(r"-[0-9]", text[end : end + 2]) and not re.match(
        r"-(?:[0-9]{1,3}\.){3}[0-9]", text[end : end + 14]
    ):
        return None
    before = text[max(0, start - 80) : start]
    if re.search(r"[0-9A-Za-z]-$", before) and not re.search(r"(?:[0-9]+\.){3}[0-9]+-$", before):
        return None
    if _VERSION_WORD.search(before) or _PACKAGE.search(before):
        return None
    first, *others = map(int, match[0].split("."))
    small = max(others) < 100
    if _AGENT.search(before) and (first < 32 or others == [0, 0, 0]) or others == [0, 0, 0]:
        return None
    if _ADDRESS_WORD.search(before) or _ADDRESS_BEHIND.match(text, end):
        return end
    if first <= 11 and small:
        return None
    if first <= 31 and (
        _NAME.search(before)
        or small
        and not before.strip()
        and re.match(r"\.?\s+[A-Z\u4e00-\u9fff]", text[end : end + 4])
    ):
        return None
    return end
