# Boots one machine and boots it again whenever it reboots. Arguments: lower,
# upper, work and root directory, the directory that it has as /run/flotilla, its
# control group, then the command that runs the container. It stays as the parent
# of the container, in a mount namespace of its own: with the last process the
# mounts go too. File 3 is the machine's lock; the container must not hold it.
lower=$1 upper=$2 work=$3 root=$4 run=$5 group=$6
shift 6
# A group that gives controllers to its children has no processes of its own.
mkdir -p "$group/boot"
echo 0 >"$group/boot/cgroup.procs"
mount -t overlay overlay -o "lowerdir=$lower,upperdir=$upper,workdir=$work" "$root"
# The lock kept other programs from starting the machine at the same time. From
# here on they find its processes in the control group.
exec 3>&-
while :; do
	# Nothing below /run outlives a boot, this directory of the host's included.
	find "$run" -mindepth 1 -delete
	status=0
	(
		for controller in $(cat "$group/cgroup.subtree_control"); do echo "-$controller" >"$group/cgroup.subtree_control"; done
		echo 0 >"$group/cgroup.procs"
		exec "$@"
	) || status=$?
	# The container asks for a reboot by this number.
	[ "$status" = 133 ] || exit "$status"
done
