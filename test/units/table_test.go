//go:build cluster

package units_test

import "testing"

// fleetSuite says for each test of fleet's functional suite which test here
// covers what it was about, or why none does.
var fleetSuite = []struct {
	name  string
	cover func(*testing.T)
	why   string // there is none
}{
	{"TestKnownHostsVerification", TestMemberReplaced, ""},
	{"TestFleetctlWithEnv", TestFleetctlEnvironment, ""},
	{"TestDynamicClusterNewMemberUnitMigration", TestFleetdStopMoves, ""},
	{"TestDynamicClusterMemberReboot", TestMemberReplaced, ""},
	{"TestSingleNodeConnectivityLoss", TestStoreAwayFromLoneNode, ""},
	{"TestClientVersionFlag", TestFleetctlAlone, ""},
	{"TestClientVersionHelpOutput", TestFleetctlAlone, ""},
	{"TestClientHelpFlag", TestFleetctlAlone, ""},
	{"TestInstallUnit", TestInstall, ""},
	{"TestMachinesList", TestMachinesAPI, ""},
	{"TestMachinesListBadNextPageToken", TestMachinesAPI, ""},
	{"TestMachinesPatchAddModify", TestMachinesPatch, ""},
	{"TestMachinesPatchDelete", TestMachinesPatch, ""},
	{"TestMachinesPatchBad", TestMachinesAPI, ""},
	{"TestTemplatesWithSpecifiersInMetadata", TestTemplateMetadata, ""},
	{"TestNodeShutdown", TestFleetdStopPinned, ""},
	{"TestDetectMachineId", TestFleetdSameMachineID, ""},
	{"TestScheduleMachineOf", TestFleetdStopTogether, ""},
	{"TestScheduleConflicts", TestConflicts, ""},
	{"TestScheduleOneWayConflict", TestConflictOneWay, ""},
	{"TestScheduleMultipleConflicts", TestConflictLines, ""},
	{"TestScheduleReplace", TestReplaces, ""},
	{"TestScheduleCircularReplace", TestReplacesEachOther, ""},
	{"TestScheduleConditionMachineID", TestMachineID, ""},
	{"TestScheduleGlobalUnits", TestGlobal, ""},
	{"TestScheduleGlobalConflicts", TestGlobalConflict, ""},
	{"TestReconfigureServer", TestFleetdReload, ""},
	{"TestShutdown", TestFleetdStop, ""},
	{"TestShutdownVsMonitor", TestFleetdStopWithoutStore, ""},
	{"TestSystemdUnitFlow", nil, "it tests a library of fleet's; internal/systemd has tests of its own with a real systemd"},
	{"TestTunnelScheduleBatchUnits", TestFleetctlTunnel, ""},
	{"TestUnitRunnable", TestStart, ""},
	{"TestUnitSubmit", TestVerbs, ""},
	{"TestUnitLoad", TestVerbs, ""},
	{"TestUnitStart", TestVerbs, ""},
	{"TestUnitSubmitReplace", TestReplaceVerbs, ""},
	{"TestUnitLoadReplace", TestReplaceVerbs, ""},
	{"TestUnitStartReplace", TestReplaceVerbs, ""},
	{"TestUnitRestart", TestRestart, ""},
	{"TestUnitSSHActions", TestReach, ""},
	{"TestUnitCat", TestReach, ""},
	{"TestUnitStatus", TestReach, ""},
	{"TestListUnitFilesOrder", TestOrderOfFiles, ""},
	// The suite ran a second time through gRPC, which nobody asks for here.
	{"TestReplaceSerialization, given up upstream", TestReplaceInOrder, ""},
}

// TestFleetSuite: nothing of the suite is without an answer.
func TestFleetSuite(t *testing.T) {
	for _, s := range fleetSuite {
		if (s.cover == nil) == (s.why == "") {
			t.Errorf("%s has either no test and no reason, or both", s.name)
		}
	}
	if len(fleetSuite) != 43+1 {
		t.Errorf("%d tests of the suite, want 43 and one more", len(fleetSuite))
	}
}
