# reload.sh NETCAT SOCKET: has the HAProxy master behind SOCKET load its file, and
# ends when it has: of two reloads at a time the second could be lost. The socket is
# away during a reload, and answers after it.
echo reload | "$1" -N -U "$2"
for i in $(seq 1000); do
	echo show proc | "$1" -N -U "$2" >/dev/null 2>&1 && exit
	sleep 0.01
done
exit 1
