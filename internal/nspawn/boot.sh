# Boots one machine and boots it again whenever it reboots. Arguments: lower,
# upper, work and root directory, the directory that it has as /run/flotilla,
# control groups (empty: a unit of systemd has made one), then the command that
# runs the container. It stays as the father of the container, in a mount
# namespace of its own: with the last process the mounts go too. File 3 is the
# machine's lock; the container must not hold it.
lower=$1 upper=$2 work=$3 root=$4 run=$5 groups=$6
shift 6
if [ -z "$groups" ]; then
	own=$(sed -n 's/^0:://p' /proc/self/cgroup)
	for base in /sys/fs/cgroup /sys/fs/cgroup/unified; do
		if [ -e "$base$own/cgroup.procs" ] && [ "$own" != / ]; then groups="$base$own"; fi
	done
else
	for g in $groups; do mkdir -p "$g"; echo 0 >"$g/cgroup.procs"; done
fi
# A group that gives controllers to its children has no processes of its own.
for g in $groups; do mkdir -p "$g/boot"; echo 0 >"$g/boot/cgroup.procs"; done
mount -t overlay overlay -o "lowerdir=$lower,upperdir=$upper,workdir=$work" "$root"
# What a killed predecessor left is gone by now: from here on the lock is of no use.
exec 3>&-
while :; do
	# Nothing below /run outlives a boot, this directory of the host's included.
	find "$run" -mindepth 1 -delete
	status=0
	(
		for g in $groups; do
			if [ -e "$g/cgroup.subtree_control" ]; then
				for controller in $(cat "$g/cgroup.subtree_control"); do echo "-$controller" >"$g/cgroup.subtree_control"; done
			fi
			echo 0 >"$g/cgroup.procs"
		done
		exec "$@"
	) || status=$?
	# The container asks for a reboot by this number.
	[ "$status" = 133 ] || exit "$status"
done
