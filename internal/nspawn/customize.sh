set -eu
root=$1
chroot "$root" sh -eu <<'INSIDE'
# The user that fleet's machines have.
getent group core >/dev/null || groupadd --gid 500 core
useradd --uid 500 --gid 500 --create-home --shell /bin/bash --groups sudo,systemd-journal core
echo 'core ALL=(ALL) NOPASSWD: ALL' >/etc/sudoers.d/core
chmod 440 /etc/sudoers.d/core
# Flotilla runs HAProxy itself, and nobody updates packages or logs in on the console.
systemctl disable haproxy.service
systemctl enable ssh.service
systemctl mask apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer fstrim.timer e2scrub_all.timer \
	console-getty.service systemd-networkd-wait-online.service systemd-resolved.service
INSIDE
# Each machine has its own of these.
rm -f "$root"/etc/ssh/ssh_host_* "$root"/etc/hostname "$root"/etc/resolv.conf
: >"$root/etc/machine-id"
rm -f "$root/var/lib/dbus/machine-id" "$root"/var/cache/apt/*.bin
# The journal outlives the machine's power.
mkdir -p "$root/var/log/journal" "$root/etc/systemd/journald.conf.d"
printf '[Journal]\nSystemMaxUse=256M\nRateLimitIntervalSec=0\n' >"$root/etc/systemd/journald.conf.d/flotilla.conf"
# The machine is never root's only way in: its console is a file.
printf 'PermitRootLogin prohibit-password\nUseDNS no\nPasswordAuthentication no\n' >"$root/etc/ssh/sshd_config.d/flotilla.conf"
# Nothing has to be brought up to date at the first boot.
touch "$root/etc/.updated" "$root/var/.updated"
