#!/bin/sh
# Completes a root file system that holds /usr/bin/cohort: the libraries it links, in the places the loader looks, an
# unprivileged user, and the folders it writes to when they are mounted. Prints its size.
set -eu
root=$1

# "name => path (address)" and the loader, "path (address)".
ldd "$root/usr/bin/cohort" | sed -n -e 's/.* => \(\/[^ ]*\).*/\1/p' -e 's/^[[:space:]]*\(\/[^ ]*\) (.*/\1/p' |
    while read -r library; do
        mkdir -p "$root$(dirname "$library")"
        cp -L "$library" "$root$library"
    done

mkdir -p "$root/etc" "$root/cache" "$root/models" "$root/tmp"
chmod 1777 "$root/tmp"
echo 'cohort:x:65532:65532:cohort:/nonexistent:/sbin/nologin' >"$root/etc/passwd"
echo 'cohort:x:65532:' >"$root/etc/group"
# Names are looked up in files first, then by DNS.
echo 'hosts: files dns' >"$root/etc/nsswitch.conf"
chown 65532:65532 "$root/cache"
du -sh "$root"
